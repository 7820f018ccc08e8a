package proxy

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	security "istio.io/api/security/v1alpha1"
	"istio.io/istio/pkg/workloadapi"
)

const (
	token             = "the-token"
	addressType       = "type.googleapis.com/istio.workload.Address"
	authorizationType = "type.googleapis.com/istio.security.Authorization"
)

func identity(account string) string { return "spiffe://cluster.local/ns/shop/sa/" + account }

// authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	certificate, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{certificate, key}
}

func (a *authority) pem() []byte { return encode(a.certificate.Raw) }

func encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// sign makes a certificate of these names; an identity is a URI.
func (a *authority) sign(key crypto.PublicKey, names ...string) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, name := range names {
		if uri, err := url.Parse(name); err == nil && uri.Scheme != "" {
			template.URIs = append(template.URIs, uri)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return x509.CreateCertificate(rand.Reader, template, a.certificate, key, a.key)
}

// server is a certificate with its key.
func (a *authority) server(t *testing.T, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := a.sign(key.Public(), names...)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// controlPlane serves discovery and signs.
type controlPlane struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	security.UnimplementedIstioCertificateServiceServer
	t       *testing.T
	root    *authority
	streams chan *stream

	mutex sync.Mutex
	// roots are told besides the own one.
	roots  []*authority
	signed []*signing
}

// signing is a request for a certificate.
type signing struct {
	csr      *x509.CertificateRequest
	identity string
	metadata metadata.MD
}

// stream is one of the proxy's.
type stream struct {
	t        *testing.T
	server   discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	requests chan *discovery.DeltaDiscoveryRequest
	end      chan struct{}
	nonce    int
}

func serveControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	c := &controlPlane{t: t, root: newAuthority(t), streams: make(chan *stream, 4)}
	listener, err := net.Listen("tcp", "127.0.0.1:15012")
	must(t, err)
	config := &tls.Config{Certificates: []tls.Certificate{c.root.server(t, "localhost")}, NextProtos: []string{"h2"}}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	discovery.RegisterAggregatedDiscoveryServiceServer(server, c)
	security.RegisterIstioCertificateServiceServer(server, c)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return c
}

func (c *controlPlane) DeltaAggregatedResources(server discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s := &stream{t: c.t, server: server, requests: make(chan *discovery.DeltaDiscoveryRequest, 64), end: make(chan struct{})}
	go func() {
		for {
			request, err := server.Recv()
			if err != nil {
				close(s.requests)
				return
			}
			s.requests <- request
		}
	}()
	c.streams <- s
	select {
	case <-s.end:
		return nil
	case <-server.Context().Done():
		return server.Context().Err()
	}
}

func (c *controlPlane) CreateCertificate(ctx context.Context, request *security.IstioCertificateRequest) (*security.IstioCertificateResponse, error) {
	block, _ := pem.Decode([]byte(request.Csr))
	if block == nil {
		return nil, fmt.Errorf("the CSR is no PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	asked := request.Metadata.GetFields()["ImpersonatedIdentity"].GetStringValue()
	sent, _ := metadata.FromIncomingContext(ctx)
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.signed = append(c.signed, &signing{csr, asked, sent})
	leaf, err := c.root.sign(csr.PublicKey, asked)
	if err != nil {
		return nil, err
	}
	roots := c.root.pem()
	for _, other := range c.roots {
		roots = append(roots, other.pem()...)
	}
	return &security.IstioCertificateResponse{CertChain: []string{string(encode(leaf)), string(roots)}}, nil
}

// connected is the proxy's next stream.
func (c *controlPlane) connected() *stream {
	c.t.Helper()
	select {
	case s := <-c.streams:
		return s
	case <-time.After(wait):
		c.t.Fatal("the proxy opens no stream")
		return nil
	}
}

// next is the next request about a type.
func (s *stream) next(of string) *discovery.DeltaDiscoveryRequest {
	s.t.Helper()
	for end := time.After(wait); ; {
		select {
		case request, open := <-s.requests:
			if !open {
				s.t.Fatal("the proxy ended its stream")
			}
			if request.TypeUrl == of {
				return request
			}
		case <-end:
			s.t.Fatalf("no request about %s", of)
		}
	}
}

// tell sends resources, and returns what the proxy answers.
func (s *stream) tell(of string, removed []string, resources ...*discovery.Resource) *discovery.DeltaDiscoveryRequest {
	s.t.Helper()
	s.nonce++
	nonce := strconv.Itoa(s.nonce)
	must(s.t, s.server.Send(&discovery.DeltaDiscoveryResponse{
		TypeUrl: of, Nonce: nonce, Resources: resources, RemovedResources: removed,
	}))
	for {
		if answer := s.next(of); answer.ResponseNonce == nonce {
			return answer
		}
	}
}

// accepts tells resources that the proxy takes.
func (s *stream) accepts(of string, resources ...*discovery.Resource) {
	s.t.Helper()
	if rejected := s.tell(of, nil, resources...).ErrorDetail; rejected != nil {
		s.t.Fatalf("rejected: %s", rejected.Message)
	}
}

// begins answers the first requests: what the proxy has to know before it serves.
func (s *stream) begins(addresses ...*discovery.Resource) {
	s.t.Helper()
	s.accepts(addressType, addresses...)
	s.accepts(authorizationType)
}

func resource(t *testing.T, name, version string, of string, message proto.Message) *discovery.Resource {
	t.Helper()
	value, err := proto.Marshal(message)
	must(t, err)
	return &discovery.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: of, Value: value}}
}

// pod is one of the mesh that serves the Service.
func pod(t *testing.T, uid, account, ip, version string) *discovery.Resource {
	t.Helper()
	return resource(t, uid, version, addressType, &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: &workloadapi.Workload{
		Uid: uid, Name: account, Namespace: "shop", ServiceAccount: account, TrustDomain: "cluster.local", Node: "node-2",
		Addresses: [][]byte{net.ParseIP(ip).To4()}, TunnelProtocol: workloadapi.TunnelProtocol_HBONE,
		WorkloadName: account, CanonicalName: account, CanonicalRevision: "v1", ClusterId: "Kubernetes",
		Services: map[string]*workloadapi.PortList{
			serviceName: {Ports: []*workloadapi.Port{{ServicePort: 80, TargetPort: 8080}}},
		},
	}}})
}

const serviceName = "shop/web.shop.svc.cluster.local"

func service(t *testing.T) *discovery.Resource {
	t.Helper()
	return resource(t, serviceName, "1", addressType, &workloadapi.Address{Type: &workloadapi.Address_Service{Service: &workloadapi.Service{
		Name: "web", Namespace: "shop", Hostname: "web.shop.svc.cluster.local",
		Addresses: []*workloadapi.NetworkAddress{{Address: net.ParseIP(serviceIP).To4()}},
		Ports:     []*workloadapi.Port{{ServicePort: 80, TargetPort: 8080}},
	}}})
}
