package foreign

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"istio.io/istio/pkg/workloadapi"
)

const (
	addressType       = "type.googleapis.com/istio.workload.Address"
	authorizationType = "type.googleapis.com/istio.security.Authorization"
)

type delta = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// client is one stream, and what it was told: as a proxy keeps it.
type client struct {
	t         *testing.T
	stream    delta
	responses chan *discovery.DeltaDiscoveryResponse
	ended     chan error
	addresses map[string]*workloadapi.Address
	versions  map[string]string
}

func open(t *testing.T, connection *grpc.ClientConn, token string) *client {
	t.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(connection).DeltaAggregatedResources(as(t, token))
	if err != nil {
		t.Fatal(err)
	}
	c := &client{
		t: t, stream: stream,
		responses: make(chan *discovery.DeltaDiscoveryResponse, 1024), ended: make(chan error, 1),
		addresses: map[string]*workloadapi.Address{}, versions: map[string]string{},
	}
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				c.ended <- err
				return
			}
			c.responses <- response
		}
	}()
	return c
}

func connect(t *testing.T) *client {
	t.Helper()
	setStage(t)
	return open(t, controller(t), token(t, node1))
}

func (c *client) send(request *discovery.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.stream.Send(request); err != nil {
		c.t.Fatal(err)
	}
}

// next takes one response in, and acknowledges it.
func (c *client) next(kind string) *discovery.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case response := <-c.responses:
		c.absorb(response, kind)
		c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: response.TypeUrl, ResponseNonce: response.Nonce})
		return response
	case err := <-c.ended:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(wait):
		c.t.Fatalf("no response within %v", wait)
	}
	return nil
}

func (c *client) absorb(response *discovery.DeltaDiscoveryResponse, kind string) {
	c.t.Helper()
	if response.TypeUrl != kind || response.Nonce == "" {
		c.t.Fatalf("a response of %q with nonce %q", response.TypeUrl, response.Nonce)
	}
	if size := proto.Size(response); size > 4<<20 {
		c.t.Errorf("a response of %d bytes: gRPC's usual limit is 4 MiB", size)
	}
	for _, resource := range response.Resources {
		address := &workloadapi.Address{}
		if resource.Resource.GetTypeUrl() != kind {
			c.t.Fatalf("%s is of type %q", resource.Name, resource.Resource.GetTypeUrl())
		}
		if err := (proto.UnmarshalOptions{}).Unmarshal(resource.Resource.Value, address); err != nil {
			c.t.Fatalf("%s: %v", resource.Name, err)
		}
		if unknown := address.ProtoReflect().GetUnknown(); len(unknown) > 0 {
			c.t.Errorf("%s has fields that Istio does not know: %x", resource.Name, unknown)
		}
		if resource.Version == "" {
			c.t.Errorf("%s has no version", resource.Name)
		}
		if want := name(address); resource.Name != want {
			c.t.Errorf("a resource is called %q, its content %q", resource.Name, want)
		}
		for _, alias := range aliases(address) {
			if !slices.Contains(resource.Aliases, alias) {
				c.t.Errorf("%s has not the alias %q: %v", resource.Name, alias, resource.Aliases)
			}
		}
		c.addresses[resource.Name], c.versions[resource.Name] = address, resource.Version
	}
	for _, name := range response.RemovedResources {
		delete(c.addresses, name)
		delete(c.versions, name)
	}
}

// until takes responses in until there is nothing wrong any more.
func (c *client) until(check func() error) {
	c.t.Helper()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case response := <-c.responses:
			c.absorb(response, addressType)
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: response.TypeUrl, ResponseNonce: response.Nonce})
		case ended := <-c.ended:
			c.t.Fatalf("the stream ended (%v): %v", ended, err)
		case <-time.After(wait):
			c.t.Fatalf("no response within %v: %v", wait, err)
		}
	}
}

// quiet waits for a moment in which nothing about the stage is told.
func (c *client) quiet() {
	c.t.Helper()
	for end := time.After(2 * time.Second); ; {
		select {
		case response := <-c.responses:
			for _, resource := range response.Resources {
				if strings.HasPrefix(resource.Name, mesh+"/") || c.addresses[resource.Name].GetWorkload().GetNamespace() == mesh {
					c.t.Errorf("told again: %s", resource.Name)
				}
			}
		case err := <-c.ended:
			c.t.Fatalf("the stream ended: %v", err)
		case <-end:
			return
		}
	}
}

func name(address *workloadapi.Address) string {
	if service := address.GetService(); service != nil {
		return service.Namespace + "/" + service.Hostname
	}
	return address.GetWorkload().GetUid()
}

func aliases(address *workloadapi.Address) (all []string) {
	alias := func(network string, bytes []byte) {
		if ip, ok := netip.AddrFromSlice(bytes); ok {
			all = append(all, network+"/"+ip.String())
		}
	}
	for _, ip := range address.GetService().GetAddresses() {
		alias(ip.Network, ip.Address)
	}
	// Pods of one host share its addresses.
	if workload := address.GetWorkload(); workload.GetNetworkMode() == workloadapi.NetworkMode_STANDARD {
		for _, ip := range workload.GetAddresses() {
			alias(workload.Network, ip)
		}
	}
	return all
}

// everything subscribes as Istio's proxy does by default: one request without names.
func everything(t *testing.T) *client {
	t.Helper()
	c := connect(t)
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType})
	c.until(c.hasStage)
	return c
}

func (c *client) hasStage() error {
	for _, name := range []string{"web", "far"} {
		if c.workload(mesh, name).GetTunnelProtocol() != workloadapi.TunnelProtocol_HBONE {
			return fmt.Errorf("%s does not speak HBONE in %v", name, slices.Collect(maps.Keys(c.addresses)))
		}
	}
	if c.workload(outside, "plain") == nil || c.service("web") == nil {
		return errors.New("plain or the service web is missing")
	}
	return nil
}

func (c *client) workload(namespace, name string) *workloadapi.Workload {
	for _, address := range c.addresses {
		if found := address.GetWorkload(); found.GetNamespace() == namespace && found.GetName() == name {
			return found
		}
	}
	return nil
}

func (c *client) service(name string) *workloadapi.Service {
	return c.addresses[mesh+"/"+name+"."+mesh+".svc.cluster.local"].GetService()
}

func ips(t *testing.T, all [][]byte) (read []string) {
	t.Helper()
	for _, bytes := range all {
		ip, ok := netip.AddrFromSlice(bytes)
		if !ok {
			t.Fatalf("no address: %x", bytes)
		}
		read = append(read, ip.String())
	}
	return read
}

func same[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestAWorkloadSaysAllThatKubernetesKnows(t *testing.T) {
	c := everything(t)
	web := c.workload(mesh, "web")
	same(t, "uid", web.Uid, field(t, ".metadata.uid", "-n", mesh, "pod", "web"))
	same(t, "addresses", strings.Join(ips(t, web.Addresses), " "), field(t, ".status.podIPs[*].ip", "-n", mesh, "pod", "web"))
	same(t, "node", web.Node, node1)
	same(t, "service account", web.ServiceAccount, "web")
	same(t, "trust domain", web.TrustDomain, "cluster.local")
	same(t, "canonical name", web.CanonicalName, "web-app")
	same(t, "canonical revision", web.CanonicalRevision, "v7")
	same(t, "type", web.WorkloadType, workloadapi.WorkloadType_POD)
	same(t, "workload name", web.WorkloadName, "web")
	same(t, "status", web.Status, workloadapi.WorkloadStatus_HEALTHY)
	same(t, "network mode", web.NetworkMode, workloadapi.NetworkMode_STANDARD)
	same(t, "cluster", web.ClusterId, "Kubernetes")
	ports := web.Services[mesh+"/web."+mesh+".svc.cluster.local"].GetPorts()
	targets := map[uint32]uint32{}
	for _, port := range ports {
		targets[port.ServicePort] = port.TargetPort
	}
	if !maps.Equal(targets, map[uint32]uint32{90: 9000, 80: 8080}) {
		t.Errorf("ports of its service: %v", targets)
	}
	same(t, "plain's tunnel", c.workload(outside, "plain").TunnelProtocol, workloadapi.TunnelProtocol_NONE)
	agent := c.workload(system, systemPod(t, "ambit-node-agent", node1))
	same(t, "the agent's network", agent.GetNetworkMode(), workloadapi.NetworkMode_HOST_NETWORK)
	proxy := c.workload(system, systemPod(t, "ambit-proxy", node1))
	same(t, "the proxy's tunnel", proxy.GetTunnelProtocol(), workloadapi.TunnelProtocol_NONE)
}

func TestAServiceSaysAllThatKubernetesKnows(t *testing.T) {
	c := everything(t)
	web := c.service("web")
	var addresses [][]byte
	for _, address := range web.Addresses {
		addresses = append(addresses, address.Address)
	}
	same(t, "addresses", strings.Join(ips(t, addresses), " "), field(t, ".spec.clusterIPs[*]", "-n", mesh, "service", "web"))
	same(t, "families", web.IpFamilies, workloadapi.IPFamilies_DUAL)
	same(t, "canonical", web.Canonical, true)
	ports := map[uint32]string{}
	for _, port := range web.Ports {
		ports[port.ServicePort] = fmt.Sprint(port.TargetPort, " ", port.AppProtocol)
	}
	if !maps.Equal(ports, map[uint32]string{90: "9000 TCP", 80: "8080 HTTP11"}) {
		t.Errorf("ports: %v", ports)
	}
	same(t, "addresses of a headless one", len(c.service("headless").GetAddresses()), 0)
	near := c.service("close").GetLoadBalancing()
	same(t, "mode of PreferSameZone", near.GetMode(), workloadapi.LoadBalancing_FAILOVER)
	if scopes := near.GetRoutingPreference(); !slices.Contains(scopes, workloadapi.LoadBalancing_ZONE) {
		t.Errorf("scopes of PreferSameZone: %v", scopes)
	}
	local := c.service("local").GetLoadBalancing()
	same(t, "mode of internalTrafficPolicy Local", local.GetMode(), workloadapi.LoadBalancing_STRICT)
	same(t, "scopes of it", fmt.Sprint(local.GetRoutingPreference()), "[NODE]")
	early := c.service("early").GetLoadBalancing()
	same(t, "health of publishNotReadyAddresses", early.GetHealthPolicy(), workloadapi.LoadBalancing_ALLOW_ALL)
}

func TestOnlyWhatChangedIsToldAndWhatIsGoneIsRemoved(t *testing.T) {
	c := everything(t)
	kubectl(t, pod(mesh, "extra", node2), "apply", "-f", "-")
	c.until(func() error {
		extra := c.workload(mesh, "extra")
		if extra.GetTunnelProtocol() != workloadapi.TunnelProtocol_HBONE || extra.GetStatus() != workloadapi.WorkloadStatus_HEALTHY {
			return fmt.Errorf("extra: %v", extra)
		}
		return nil
	})
	uid := c.workload(mesh, "extra").Uid
	version := c.versions[uid]
	kubectl(t, "", "-n", mesh, "label", "pod", "extra", "istio.io/dataplane-mode=none")
	c.until(func() error {
		if c.workload(mesh, "extra").GetTunnelProtocol() != workloadapi.TunnelProtocol_NONE {
			return errors.New("extra still speaks HBONE")
		}
		return nil
	})
	if c.versions[uid] == version {
		t.Error("another content under the same version")
	}
	kubectl(t, "", "-n", mesh, "label", "pod", "extra", "istio.io/dataplane-mode-")
	c.until(func() error {
		if c.workload(mesh, "extra").GetTunnelProtocol() != workloadapi.TunnelProtocol_HBONE {
			return errors.New("extra does not speak HBONE again")
		}
		return nil
	})
	same(t, "version of the same content", c.versions[uid], version)
	kubectl(t, "", "-n", mesh, "delete", "pod", "extra")
	c.until(func() error {
		if extra := c.workload(mesh, "extra"); extra != nil {
			return fmt.Errorf("extra is still there: %v", extra)
		}
		return nil
	})
	c.quiet()
}

func TestAReconnectingClientIsToldOnlyTheDifference(t *testing.T) {
	first := everything(t)
	held := maps.Clone(first.versions)
	far := first.workload(mesh, "far").Uid
	held[far] = "an older one"
	held["long-gone"] = "1"
	second := connect(t)
	second.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType, InitialResourceVersions: held})
	response := second.next(addressType)
	var told []string
	for _, resource := range response.Resources {
		if _, known := first.versions[resource.Name]; known && resource.Version == first.versions[resource.Name] {
			told = append(told, resource.Name)
		}
	}
	if !slices.Equal(told, []string{far}) {
		t.Errorf("told again: %v, wanted only %s", told, far)
	}
	if !slices.Contains(response.RemovedResources, "long-gone") {
		t.Errorf("removed: %v", response.RemovedResources)
	}
}

func TestAClientOnDemandIsToldWhatItNames(t *testing.T) {
	c := connect(t)
	c.send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: addressType, ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"*"},
	})
	c.next(addressType)
	same(t, "resources before anything is named", len(c.addresses), 0)
	ip := podIP(t, mesh, "far")
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType, ResourceNamesSubscribe: []string{"/" + ip}})
	c.next(addressType)
	same(t, "by address", c.workload(mesh, "far").GetName(), "far")
	same(t, "others", c.workload(mesh, "web"), nil)

	c.send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: addressType, ResourceNamesSubscribe: []string{mesh + "/web." + mesh + ".svc.cluster.local"},
	})
	c.next(addressType)
	if c.service("web") == nil || c.workload(mesh, "web") == nil {
		t.Errorf("a service comes with its workloads: %v", c.addresses)
	}

	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType, ResourceNamesSubscribe: []string{"/192.0.2.77"}})
	if response := c.next(addressType); !slices.Equal(response.RemovedResources, []string{"/192.0.2.77"}) {
		t.Errorf("a name that stands for nothing: %v", response)
	}
}

func TestAnUnknownOrEmptyTypeDoesNotDisturbTheOthers(t *testing.T) {
	c := connect(t)
	for _, kind := range []string{"type.googleapis.com/envoy.config.cluster.v3.Cluster", "", "x"} {
		c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: kind})
	}
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: authorizationType})
	if response := c.next(authorizationType); len(response.Resources) != 0 {
		t.Errorf("policies that nobody made: %v", response.Resources)
	}
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType})
	c.until(c.hasStage)
}

// metric is the value of one of the controllers' counters, over all replicas.
func metric(t *testing.T, start string) (sum float64) {
	t.Helper()
	pods := field(t, ".items[*].status.podIP", "-n", system, "pods", "-l", "app.kubernetes.io/name=ambit-controller")
	for _, ip := range strings.Fields(pods) {
		answer, err := http.Get("http://" + ip + ":15014/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			var value float64
			if rest, found := strings.CutPrefix(line, start); found {
				if _, err := fmt.Sscan(strings.TrimSpace(rest), &value); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				sum += value
			}
		}
	}
	return sum
}

func TestARejectionIsCountedAndEndsNothing(t *testing.T) {
	const counter = `ambit_controller_discovery_rejections_total{type="address"}`
	before := metric(t, counter)
	c := connect(t)
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType})
	var response *discovery.DeltaDiscoveryResponse
	select {
	case response = <-c.responses:
	case err := <-c.ended:
		t.Fatal(err)
	}
	c.send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: addressType, ResponseNonce: response.Nonce,
		ErrorDetail: &rpc.Status{Code: int32(codes.InvalidArgument), Message: "a test does not like it"},
	})
	eventually(t, "the rejection is counted", func() error {
		if now := metric(t, counter); now != before+1 {
			return fmt.Errorf("%v, before %v", now, before)
		}
		return nil
	})
	// An answer to what was never sent is no reason to end either.
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType, ResponseNonce: "made up"})
	kubectl(t, pod(mesh, "after", node1), "apply", "-f", "-")
	c.until(func() error {
		if c.workload(mesh, "after") == nil {
			return errors.New("no news after the rejection")
		}
		return nil
	})
	kubectl(t, "", "-n", mesh, "delete", "pod", "after")
}

func TestWhoHasNoTokenOfAProxyIsToldNothing(t *testing.T) {
	setStage(t)
	connection := controller(t)
	for name, token := range map[string]string{
		"none": "", "nonsense": "x", "another audience": otherAudience(t), "another account": otherAccount(t),
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, connection, token)
			// A stream that was refused may have ended already.
			_ = c.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: addressType})
			select {
			case err := <-c.ended:
				same(t, "code", status.Code(err), codes.Unauthenticated)
			case response := <-c.responses:
				t.Errorf("told %d resources", len(response.Resources))
			case <-time.After(wait):
				t.Error("neither told nor refused")
			}
		})
	}
}

func TestTheControllerSpeaksOnlyTLSThatIsItsOwn(t *testing.T) {
	ip := field(t, ".items[0].status.podIP", "-n", system, "pods", "-l", "app.kubernetes.io/name=ambit-controller")
	for name, transport := range map[string]credentials.TransportCredentials{
		"plaintext": insecure.NewCredentials(),
		"TLS 1.1": credentials.NewTLS(&tls.Config{
			RootCAs: roots(t), ServerName: host, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11,
		}),
		"another name": credentials.NewTLS(&tls.Config{RootCAs: roots(t), ServerName: "kubernetes.default.svc"}),
	} {
		t.Run(name, func(t *testing.T) {
			c := discovery.NewAggregatedDiscoveryServiceClient(dial(t, ip, transport))
			stream, err := c.DeltaAggregatedResources(as(t, ""))
			if err == nil {
				_, err = stream.Recv()
			}
			same(t, "code", status.Code(err), codes.Unavailable)
		})
	}
}

// raw sends bytes as they are in place of a message.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

func TestBytesThatAreNoMessageEndTheirStreamOnly(t *testing.T) {
	c := everything(t)
	connection := controller(t)
	for _, bytes := range [][]byte{{0xff}, []byte("\x0a\xff\xff\xff\xff\x0f"), []byte("hello, this is no protobuf")} {
		description := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
		method := "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
		stream, err := connection.NewStream(as(t, token(t, node1)), description, method, grpc.ForceCodec(raw{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.SendMsg(&bytes); err != nil {
			t.Fatal(err)
		}
		var answer []byte
		if err := stream.RecvMsg(&answer); err == nil {
			t.Errorf("%x was answered with %d bytes", bytes, len(answer))
		}
	}
	kubectl(t, pod(mesh, "still", node1), "apply", "-f", "-")
	c.until(func() error {
		if c.workload(mesh, "still") == nil {
			return errors.New("no news on the other stream")
		}
		return nil
	})
	kubectl(t, "", "-n", mesh, "delete", "pod", "still")
}
