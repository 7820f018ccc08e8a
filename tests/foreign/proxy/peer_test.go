package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"

	"golang.org/x/net/http2"
)

// peer is the proxy of another node: HBONE by Go's own TLS and HTTP/2. It sends back what a stream carries.
type peer struct {
	t        *testing.T
	listener net.Listener
	// status is what a CONNECT is answered with.
	status int

	mutex       sync.Mutex
	server      *http.Server
	connections []tls.ConnectionState
	names       []string
	requests    []*http.Request
}

// servePeer serves at the address of pods that are somewhere else, with a certificate of theirs.
func servePeer(t *testing.T, certificate tls.Certificate, clients *authority) *peer {
	t.Helper()
	p := &peer{t: t, status: http.StatusOK}
	pool := x509.NewCertPool()
	pool.AddCert(clients.certificate)
	config := &tls.Config{
		Certificates: []tls.Certificate{certificate}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		NextProtos: []string{"h2"},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			p.mutex.Lock()
			defer p.mutex.Unlock()
			p.names = append(p.names, hello.ServerName)
			return nil, nil
		},
	}
	listener, err := tls.Listen("tcp", net.JoinHostPort(peerIP, "15008"), config)
	must(t, err)
	p.listener = listener
	p.renew()
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(connection.(*tls.Conn))
		}
	}()
	return p
}

// renew lets connections that come now be served by a new server, which ends on its own.
func (p *peer) renew() {
	server := &http.Server{Handler: http.HandlerFunc(p.answer)}
	must(p.t, http2.ConfigureServer(server, &http2.Server{MaxConcurrentStreams: 1000}))
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.server = server
}

func (p *peer) serve(connection *tls.Conn) {
	if connection.Handshake() != nil {
		connection.Close()
		return
	}
	p.mutex.Lock()
	p.connections = append(p.connections, connection.ConnectionState())
	server := p.server
	p.mutex.Unlock()
	http2Server := &http2.Server{MaxConcurrentStreams: 1000}
	must(p.t, http2.ConfigureServer(server, http2Server))
	http2Server.ServeConn(connection, &http2.ServeConnOpts{BaseConfig: server, Handler: server.Handler})
}

func (p *peer) answer(answer http.ResponseWriter, request *http.Request) {
	p.mutex.Lock()
	p.requests = append(p.requests, request)
	status := p.status
	p.mutex.Unlock()
	answer.Header().Set("baggage", "k8s.pod.name=server")
	answer.WriteHeader(status)
	controller := http.NewResponseController(answer)
	if controller.Flush() != nil || status != http.StatusOK {
		return
	}
	buffer := make([]byte, 1<<14)
	for {
		length, err := request.Body.Read(buffer)
		if length > 0 {
			if _, err := answer.Write(buffer[:length]); err != nil {
				return
			}
			_ = controller.Flush()
		}
		if err != nil {
			return
		}
	}
}

// leave says GOAWAY on the connections there are; those that come later are served by another server.
func (p *peer) leave() {
	p.mutex.Lock()
	old := p.server
	p.mutex.Unlock()
	p.renew()
	go func() { _ = old.Shutdown(context.Background()) }()
}

// refuse answers every CONNECT with this from now on.
func (p *peer) refuse(status int) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.status = status
}

func (p *peer) seen() (connections []tls.ConnectionState, requests []*http.Request) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.connections, p.requests
}

// echo opens a connection of the pod to the peer's, and shows that it carries bytes.
func echo(t *testing.T, to string) net.Conn {
	t.Helper()
	connection := dial(t, to)
	echoes(t, connection, "hello of "+connection.LocalAddr().String())
	return connection
}

// ended waits for the other side's end.
func ended(t *testing.T, connection net.Conn) {
	t.Helper()
	rest, err := io.ReadAll(connection)
	if err != nil || len(rest) > 0 {
		t.Fatal(fmt.Errorf("at the end came %q, %w", rest, err))
	}
}
