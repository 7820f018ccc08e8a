# Ambit's images, a target each: docker build --target controller -t ambit/controller .
#
#   compile ──▶ controller · node-agent (with ambit-cni) · proxy · podtool (tests)
#
# Programs already built come in with --build-arg PREBUILT=<folder of the build context>; COMPILER may
# then be any image with a shell. They must be built on the Debian release that DEBIAN names.
ARG DEBIAN=bookworm
ARG COMPILER=docker.io/library/rust:1.95-${DEBIAN}

FROM ${COMPILER} AS compile
ARG PREBUILT=
WORKDIR /src
COPY . .
RUN set -eu; \
    mkdir /out; \
    if [ -n "$PREBUILT" ]; then cp "$PREBUILT"/* /out; exit; fi; \
    apt-get update; \
    apt-get install -y --no-install-recommends libclang-dev libipset-dev; \
    cargo build --release --locked --bins; \
    cp $(tests/static-programs) /out; \
    cd target/release; \
    cp ambit-controller ambit-node-agent ambit-proxy podtool load /out

FROM docker.io/library/debian:${DEBIAN}-slim AS controller
COPY --from=compile /out/ambit-controller /usr/local/bin/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ambit-controller"]

# iptables brings both backends; the agent takes the one that the node's rules are in.
FROM docker.io/library/debian:${DEBIAN}-slim AS node-agent
RUN apt-get update \
 && apt-get install -y --no-install-recommends iproute2 ipset iptables libipset13 \
 && rm -rf /var/cache/apt/* /var/lib/apt/lists/*
COPY --from=compile /out/ambit-node-agent /out/ambit-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/ambit-node-agent"]

FROM docker.io/library/debian:${DEBIAN}-slim AS proxy
COPY --from=compile /out/ambit-proxy /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/ambit-proxy"]

# What tests and the demo run in pods: clients and servers of their own, and real ones.
FROM docker.io/library/debian:${DEBIAN}-slim AS podtool
RUN apt-get update \
 && apt-get install -y --no-install-recommends openssl redis-server \
 && rm -rf /var/cache/apt/* /var/lib/apt/lists/*
COPY --from=compile /out/podtool /out/load /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/podtool"]
