package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

const server = peerIP + ":8080"

// ready is a proxy that knows its own pod, one of another node and a Service, and the stream that told it.
func ready(t *testing.T) (*program, *stream) {
	t.Helper()
	p := start(t)
	s := p.connected()
	s.begins(pod(t, "client-uid", "client", clientIP, "1"), pod(t, "server-uid", "server", peerIP, "1"), service(t))
	p.waitReady()
	return p, s
}

// meshed is such a proxy with its peer.
func meshed(t *testing.T) (*program, *peer) {
	t.Helper()
	p, _ := ready(t)
	return p, servePeer(t, p.root.server(t, identity("server")), p.root)
}

func TestItAsksForEverythingAndSaysWhoItIs(t *testing.T) {
	p := start(t)
	s := p.connected()
	first := s.next(addressType)
	same(t, "node", first.Node.GetMetadata().GetFields()["NODE_NAME"].GetStringValue(), "node-1")
	for _, name := range first.ResourceNamesSubscribe {
		same(t, "subscription", name, "*")
	}
	same(t, "versions", len(first.InitialResourceVersions), 0)
	same(t, "nonce", first.ResponseNonce, "")
	s.accepts(addressType, pod(t, "client-uid", "client", clientIP, "1"))
	s.accepts(authorizationType)
	p.waitReady()
}

func TestABadResourceIsRejectedAndTheOthersAreTaken(t *testing.T) {
	p := start(t)
	s := p.connected()
	bad := pod(t, "bad-uid", "bad", "10.2.0.9", "1")
	bad.Resource.Value = []byte{0xff}
	answer := s.tell(addressType, nil, pod(t, "client-uid", "client", clientIP, "1"), bad, pod(t, "server-uid", "server", peerIP, "1"))
	if answer.ErrorDetail == nil || !strings.Contains(answer.ErrorDetail.Message, "bad-uid") {
		t.Fatalf("the rejection says %v", answer.ErrorDetail)
	}
	s.accepts(authorizationType)
	p.waitReady()
	servePeer(t, p.root.server(t, identity("server")), p.root)
	echo(t, server)
}

func TestItComesBackWithTheVersionsThatItHas(t *testing.T) {
	p, s := ready(t)
	servePeer(t, p.root.server(t, identity("server")), p.root)
	close(s.end)
	echo(t, server)
	again := p.connected()
	versions := again.next(addressType).InitialResourceVersions
	want := map[string]string{"client-uid": "1", "server-uid": "1", serviceName: "1"}
	same(t, "versions", fmt.Sprint(versions), fmt.Sprint(want))
	// Only what is another now has to be told.
	again.accepts(addressType, pod(t, "server-uid", "other", peerIP, "2"))
	refused(t, dial(t, server))
}

func TestItsCSRHasOneURIAndNothingElse(t *testing.T) {
	p, _ := ready(t)
	var asked *signing
	eventually(t, "a request", func() error {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		if len(p.signed) == 0 {
			return fmt.Errorf("there is none")
		}
		asked = p.signed[0]
		return nil
	})
	same(t, "identity", asked.identity, identity("client"))
	same(t, "URIs", fmt.Sprint(asked.csr.URIs), "["+identity("client")+"]")
	same(t, "subject", asked.csr.Subject.String(), "")
	same(t, "other names", len(asked.csr.DNSNames)+len(asked.csr.IPAddresses)+len(asked.csr.EmailAddresses), 0)
	same(t, "key", asked.csr.PublicKeyAlgorithm, x509.ECDSA)
	same(t, "signature", asked.csr.CheckSignature(), nil)
	same(t, "token", fmt.Sprint(asked.metadata["authorization"]), "[Bearer "+token+"]")
	same(t, "cluster", fmt.Sprint(asked.metadata["clusterid"]), "[Kubernetes]")
}

func TestItOpensTunnelsAsTheFieldDoes(t *testing.T) {
	_, peer := meshed(t)
	client := echo(t, server)
	byService := echo(t, serviceIP+":80")
	connections, requests := peer.seen()
	same(t, "connections", len(connections), 1)
	state := connections[0]
	same(t, "TLS", state.Version, tls.VersionTLS13)
	same(t, "ALPN", state.NegotiatedProtocol, "h2")
	same(t, "names", fmt.Sprint(peer.names), "[]")
	same(t, "client", fmt.Sprint(state.PeerCertificates[0].URIs), "["+identity("client")+"]")
	same(t, "requests", len(requests), 2)
	for i, source := range []net.Conn{client, byService} {
		request := requests[i]
		same(t, "method", request.Method, http.MethodConnect)
		same(t, "authority", request.Host, server)
		forwarded := fmt.Sprintf("for=%q", source.LocalAddr())
		if i == 1 {
			forwarded += ";host=web.shop.svc.cluster.local"
		}
		same(t, "forwarded", request.Header.Get("forwarded"), forwarded)
		baggage := request.Header.Get("baggage")
		for _, part := range []string{"k8s.cluster.name=Kubernetes", "k8s.namespace.name=shop", "service.name=client"} {
			if !strings.Contains(baggage, part) {
				t.Fatalf("the baggage is %s", baggage)
			}
		}
		if trace := request.Header.Get("traceparent"); !regexp.MustCompile("^00-[0-9a-f]{32}-[0-9a-f]{16}-00$").MatchString(trace) {
			t.Fatalf("the traceparent is %s", trace)
		}
	}
}

func TestAPeerOfAnyOfTheRootsIsTrustedAndNoOther(t *testing.T) {
	p := start(t)
	second, stranger := newAuthority(t), newAuthority(t)
	p.roots = []*authority{second}
	s := p.connected()
	s.begins(pod(t, "client-uid", "client", clientIP, "1"), pod(t, "server-uid", "server", peerIP, "1"))
	p.waitReady()
	ofSecond := servePeer(t, second.server(t, identity("server")), p.root)
	echo(t, server)
	ofSecond.listener.Close()
	// Another pod at the address, so that the connection there is does not serve it.
	s.accepts(addressType, pod(t, "server-uid", "server", "10.2.0.9", "2"), pod(t, "other-uid", "server", peerIP, "1"))
	servePeer(t, stranger.server(t, identity("server")), p.root)
	refused(t, dial(t, server))
}

func TestAPeerThatIsSomebodyElseGetsNothing(t *testing.T) {
	for _, names := range [][]string{
		{identity("other")}, {"spiffe://elsewhere.example/ns/shop/sa/server"}, {"server.shop"}, {},
	} {
		t.Run(fmt.Sprint(names), func(t *testing.T) {
			p, _ := ready(t)
			peer := servePeer(t, p.root.server(t, names...), p.root)
			refused(t, dial(t, server))
			_, requests := peer.seen()
			same(t, "requests", len(requests), 0)
		})
	}
}

func TestWhatThePeerRefusesIsReset(t *testing.T) {
	_, peer := meshed(t)
	for _, status := range []int{400, 401, 503} {
		peer.refuse(status)
		refused(t, dial(t, server))
	}
	peer.refuse(http.StatusOK)
	echo(t, server)
}

func TestAConnectionCarriesAHundredStreamsAndTheNextOpensAnother(t *testing.T) {
	_, peer := meshed(t)
	count := func() int { connections, _ := peer.seen(); return len(connections) }
	var open []net.Conn
	for range 100 {
		open = append(open, echo(t, server))
	}
	same(t, "connections of 100 streams", count(), 1)
	open = append(open, echo(t, server))
	same(t, "connections of 101 streams", count(), 2)
	for _, connection := range open {
		echoes(t, connection, "still here")
	}
}

func TestAfterGOAWAYStreamsGoOnAndNewOnesTakeAnotherConnection(t *testing.T) {
	_, peer := meshed(t)
	old := echo(t, server)
	peer.leave()
	count := func() int { connections, _ := peer.seen(); return len(connections) }
	eventually(t, "another connection", func() error {
		echo(t, server)
		if count() < 2 {
			return fmt.Errorf("there is but one")
		}
		return nil
	})
	echoes(t, old, "the old one goes on")
	must(t, old.(*net.TCPConn).CloseWrite())
	ended(t, old)
}

func TestAPodThatIsRemovedIsNotReachedInPlaintext(t *testing.T) {
	p, s := ready(t)
	plain, err := net.Listen("tcp", server)
	must(t, err)
	t.Cleanup(func() { plain.Close() })
	if answer := s.tell(addressType, []string{"server-uid"}); answer.ErrorDetail != nil {
		t.Fatal(answer.ErrorDetail)
	}
	refused(t, dial(t, server))
	s.accepts(addressType, pod(t, "next-uid", "next", peerIP, "1"))
	servePeer(t, p.root.server(t, identity("next")), p.root)
	echo(t, server)
}
