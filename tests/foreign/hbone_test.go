package foreign

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// tunnel is an HTTP/2 connection to the proxy of a pod, frame by frame. Data of its streams is kept until it is asked for.
type tunnel struct {
	t        *testing.T
	socket   *tls.Conn
	framer   *http2.Framer
	encoded  bytes.Buffer
	encoder  *hpack.Encoder
	next     uint32
	settings map[http2.SettingID]uint32
	window   uint32
	data     map[uint32][]byte
	status   map[uint32]string
	headers  map[uint32][]hpack.HeaderField
	ended    map[uint32]bool
	reset    map[uint32]http2.ErrCode
	pings    map[[8]byte]bool
	goAway   *http2.ErrCode
}

// handshake is one as the field's proxies make it: TLS 1.3, ALPN h2, no name; the peer is known by its identity alone.
func handshake(t *testing.T, to string, change func(*tls.Config)) (*tls.Conn, error) {
	t.Helper()
	pool := roots(t)
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			leaf, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			between := x509.NewCertPool()
			for _, other := range raw[1:] {
				certificate, err := x509.ParseCertificate(other)
				if err != nil {
					return err
				}
				between.AddCert(certificate)
			}
			_, err = leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between})
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != identity("far") {
				return fmt.Errorf("the peer is %v", leaf.URIs)
			}
			return err
		},
	}
	if change != nil {
		change(config)
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	socket, err := dialer.Dial("tcp", net.JoinHostPort(to, "15008"))
	if err != nil {
		t.Fatal(err)
	}
	secured := tls.Client(socket, config)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if err := secured.HandshakeContext(ctx); err != nil {
		socket.Close()
		return nil, err
	}
	t.Cleanup(func() { secured.Close() })
	return secured, nil
}

func hbone(t *testing.T) *tunnel {
	t.Helper()
	setStage(t)
	certificate := credential(t, "web", node1)
	socket, err := handshake(t, podIP(t, mesh, "far"), func(config *tls.Config) {
		config.Certificates = []tls.Certificate{certificate}
	})
	if err != nil {
		t.Fatal(err)
	}
	same(t, "ALPN", socket.ConnectionState().NegotiatedProtocol, "h2")
	h := &tunnel{
		t: t, socket: socket, framer: http2.NewFramer(socket, socket), next: 1,
		settings: map[http2.SettingID]uint32{}, data: map[uint32][]byte{}, status: map[uint32]string{},
		headers: map[uint32][]hpack.HeaderField{}, reset: map[uint32]http2.ErrCode{}, ended: map[uint32]bool{}, pings: map[[8]byte]bool{},
	}
	h.framer.SetMaxReadFrameSize(1 << 20)
	h.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	h.encoder = hpack.NewEncoder(&h.encoded)
	h.write(io.WriteString(socket, http2.ClientPreface))
	h.sent(h.framer.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0}))
	h.sent(h.framer.WriteWindowUpdate(0, 1<<30))
	h.until("its settings", func() bool { return len(h.settings) > 0 })
	return h
}

func (h *tunnel) write(_ int, err error) { h.t.Helper(); h.sent(err) }

func (h *tunnel) sent(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("write: %v (the peer said GOAWAY %v)", err, h.goAway)
	}
}

// until reads frames until it has happened.
func (h *tunnel) until(what string, happened func() bool) {
	h.t.Helper()
	if err := h.read(wait, happened); err != nil {
		h.t.Fatalf("%s: %v (GOAWAY %v, resets %v)", what, err, h.goAway, h.reset)
	}
}

func (h *tunnel) read(limit time.Duration, happened func() bool) error {
	h.t.Helper()
	if err := h.socket.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	for !happened() {
		frame, err := h.framer.ReadFrame()
		if err != nil {
			return err
		}
		h.take(frame)
	}
	return nil
}

func (h *tunnel) take(frame http2.Frame) {
	h.t.Helper()
	stream := frame.Header().StreamID
	switch frame := frame.(type) {
	case *http2.SettingsFrame:
		if frame.IsAck() {
			return
		}
		_ = frame.ForeachSetting(func(setting http2.Setting) error {
			h.settings[setting.ID] = setting.Val
			return nil
		})
		h.sent(h.framer.WriteSettingsAck())
	case *http2.WindowUpdateFrame:
		if stream == 0 && h.window == 0 {
			h.window = frame.Increment
		}
	case *http2.MetaHeadersFrame:
		h.status[stream], h.headers[stream] = frame.PseudoValue("status"), frame.RegularFields()
	case *http2.DataFrame:
		h.data[stream] = append(h.data[stream], frame.Data()...)
		h.ended[stream] = frame.StreamEnded()
	case *http2.RSTStreamFrame:
		h.reset[stream] = frame.ErrCode
	case *http2.PingFrame:
		if frame.IsAck() {
			h.pings[frame.Data] = true
		} else {
			h.sent(h.framer.WritePing(true, frame.Data))
		}
	case *http2.GoAwayFrame:
		code := frame.ErrCode
		h.goAway = &code
	}
}

// request sends a head of these fields on a new stream.
func (h *tunnel) request(end bool, fields ...string) uint32 {
	h.t.Helper()
	h.encoded.Reset()
	for i := 0; i < len(fields); i += 2 {
		h.sent(h.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	stream, block := h.next, h.encoded.Bytes()
	h.next += 2
	const frame = 16 << 10
	first := block[:min(frame, len(block))]
	block = block[len(first):]
	h.sent(h.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: stream, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0,
	}))
	for len(block) > 0 {
		part := block[:min(frame, len(block))]
		block = block[len(part):]
		h.sent(h.framer.WriteContinuation(stream, len(block) == 0, part))
	}
	return stream
}

func (h *tunnel) connect(authority string) uint32 {
	h.t.Helper()
	return h.request(false, ":method", "CONNECT", ":authority", authority)
}

func (h *tunnel) answer(stream uint32) string {
	h.t.Helper()
	h.until(fmt.Sprintf("an answer on stream %d", stream), func() bool {
		_, reset := h.reset[stream]
		return reset || h.status[stream] != ""
	})
	if code, reset := h.reset[stream]; reset && h.status[stream] == "" {
		return "reset " + code.String()
	}
	return h.status[stream]
}

// echo opens a stream to podtool's TCP server, which greets with a line and then sends back what it gets.
func (h *tunnel) echo() uint32 {
	h.t.Helper()
	stream := h.connect(net.JoinHostPort(podIP(h.t, mesh, "far"), "9000"))
	same(h.t, "answer", h.answer(stream), "200")
	h.until("the greeting", func() bool { return bytes.HasSuffix(h.data[stream], []byte("\n")) })
	h.data[stream] = nil
	return stream
}

// works shows that a stream still carries bytes both ways.
func (h *tunnel) works(stream uint32, after string) {
	h.t.Helper()
	h.data[stream] = nil
	h.sent(h.framer.WriteData(stream, false, []byte(after+"\n")))
	h.until("the echo after "+after, func() bool { return string(h.data[stream]) == after+"\n" })
}

func TestAConnectOpensAStreamToThePodAndTellsWhoItIs(t *testing.T) {
	h := hbone(t)
	stream := h.echo()
	h.works(stream, "hello")
	var baggage string
	for _, field := range h.headers[stream] {
		if field.Name == "baggage" {
			baggage = field.Value
		}
	}
	for _, part := range []string{"k8s.namespace.name=" + mesh, "k8s.pod.name=far", "service.name=far-app", "service.version=v7"} {
		if !strings.Contains(baggage, part) {
			t.Errorf("%q is not in the baggage %q", part, baggage)
		}
	}
}

func TestTheSettingsAreThoseOfTheField(t *testing.T) {
	h := hbone(t)
	h.until("the window of the connection", func() bool { return h.window > 0 })
	for id, want := range map[http2.SettingID]uint32{
		http2.SettingInitialWindowSize: 4 << 20, http2.SettingMaxFrameSize: 1 << 20,
		http2.SettingMaxConcurrentStreams: 200, http2.SettingMaxHeaderListSize: 64 << 10,
	} {
		same(t, id.String(), h.settings[id], want)
	}
	same(t, "window of the connection", h.window+65535, 16<<20)
}

func TestPingsAreAnswered(t *testing.T) {
	h := hbone(t)
	ping := [8]byte{1, 2, 3, 4, 5, 6, 7, 8}
	h.sent(h.framer.WritePing(false, ping))
	h.until("the answer to a ping", func() bool { return h.pings[ping] })
}

func TestARequestThatMayNotBeGetsTheCodeOfTheField(t *testing.T) {
	h := hbone(t)
	stream := h.echo()
	far, web := podIP(t, mesh, "far"), podIP(t, mesh, "web")
	for name, test := range map[string]struct {
		status string
		fields []string
	}{
		"another method":       {"400", []string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", far + ":9000"}},
		"another pod":          {"400", []string{":method", "CONNECT", ":authority", web + ":9000"}},
		"a name":               {"400", []string{":method", "CONNECT", ":authority", "far." + mesh + ":9000"}},
		"no port":              {"400", []string{":method", "CONNECT", ":authority", far}},
		"a port that is none":  {"400", []string{":method", "CONNECT", ":authority", far + ":70000"}},
		"a port that is shut":  {"503", []string{":method", "CONNECT", ":authority", far + ":9999"}},
		"the tunnel's port":    {"503", []string{":method", "CONNECT", ":authority", far + ":15008"}},
		"the plaintext's port": {"503", []string{":method", "CONNECT", ":authority", far + ":15006"}},
		"the outbound's port":  {"503", []string{":method", "CONNECT", ":authority", far + ":15001"}},
	} {
		t.Run(name, func(t *testing.T) {
			same(t, "answer", h.answer(h.request(false, test.fields...)), test.status)
			h.works(stream, name)
		})
	}
}

func TestAStreamThatMisbehavesDoesNotHarmItsNeighbours(t *testing.T) {
	h := hbone(t)
	good := h.echo()
	far := net.JoinHostPort(podIP(t, mesh, "far"), "9000")

	h.sent(h.framer.WriteRSTStream(h.echo(), http2.ErrCodeCancel))
	h.works(good, "a reset")

	// A head that HTTP/2 forbids (RFC 9113, 8.5: CONNECT has no path).
	stream := h.request(false, ":method", "CONNECT", ":authority", far, ":path", "/", ":scheme", "https")
	if got := h.answer(stream); got == "200" {
		t.Errorf("a malformed CONNECT: %s", got)
	}
	h.works(good, "a malformed head")

	large := strings.Repeat("x", 100<<10)
	stream = h.request(false, ":method", "CONNECT", ":authority", far, "baggage", large)
	if got := h.answer(stream); got == "200" {
		t.Errorf("a head of 100 KiB: %s", got)
	}
	h.works(good, "a large head")

	// Nobody reads what comes on this stream: its window is full, the others' are not.
	page := h.connect(net.JoinHostPort(podIP(t, mesh, "far"), "8080"))
	same(t, "answer", h.answer(page), "200")
	h.sent(h.framer.WriteData(page, false, []byte("GET /bytes/50000000 HTTP/1.1\r\nhost: far\r\n\r\n")))
	h.until("a full window", func() bool { return len(h.data[page]) >= 65535 })
	h.works(good, "a stream that nobody reads")
}

func TestAConnectionTakesTwoHundredStreamsAndRefusesTheNextAlone(t *testing.T) {
	h := hbone(t)
	far := net.JoinHostPort(podIP(t, mesh, "far"), "9000")
	var streams []uint32
	for range 200 {
		streams = append(streams, h.connect(far))
	}
	for _, stream := range streams {
		same(t, "answer", h.answer(stream), "200")
	}
	same(t, "one more", h.answer(h.connect(far)), "reset "+http2.ErrCodeRefusedStream.String())
	for _, stream := range []uint32{streams[0], streams[199]} {
		h.until("the greeting", func() bool { return bytes.HasSuffix(h.data[stream], []byte("\n")) })
		h.works(stream, "the refusal")
	}
	h.sent(h.framer.WriteRSTStream(streams[0], http2.ErrCodeCancel))
	eventually(t, "there is room again", func() error {
		if got := h.answer(h.connect(far)); got != "200" {
			return fmt.Errorf("the answer is %s", got)
		}
		return nil
	})
}

func TestAHundredThousandSingleBytesAreCarried(t *testing.T) {
	h := hbone(t)
	stream := h.echo()
	const frames = 100_000
	back := 0
	for sent := 0; sent < frames; {
		for range min(1000, frames-sent) {
			h.sent(h.framer.WriteData(stream, false, []byte{'x'}))
			sent++
		}
		h.until("the bytes come back", func() bool { return back+len(h.data[stream]) >= sent })
		// The windows that they took.
		got := len(h.data[stream])
		h.sent(h.framer.WriteWindowUpdate(stream, uint32(got)))
		back, h.data[stream] = back+got, nil
	}
	h.works(stream, "a hundred thousand frames")
	if h.goAway != nil {
		t.Errorf("GOAWAY %v", *h.goAway)
	}
}

func TestAHalfCloseReachesThePodAndItsEndComesBack(t *testing.T) {
	h := hbone(t)
	// Podtool's server of this port answers once its client has ended.
	stream := h.connect(net.JoinHostPort(podIP(t, mesh, "far"), "9001"))
	same(t, "answer", h.answer(stream), "200")
	h.sent(h.framer.WriteData(stream, true, []byte("all of it")))
	h.until("what the server says at the end", func() bool { return h.ended[stream] })
	if said := string(h.data[stream]); !strings.Contains(said, `"bytes":9,`) {
		t.Errorf("the server was to get 9 bytes: %s", said)
	}
}

func TestWhoDoesNotShakeHandsAsTheFieldDoesIsRefused(t *testing.T) {
	setStage(t)
	far := podIP(t, mesh, "far")
	certificate := credential(t, "web", node1)
	for name, change := range map[string]func(*tls.Config){
		"no certificate":    func(config *tls.Config) { config.Certificates = nil },
		"TLS 1.2":           func(config *tls.Config) { config.MinVersion, config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"another protocol":  func(config *tls.Config) { config.NextProtos = []string{"http/1.1"} },
		"a foreign root":    func(config *tls.Config) { config.Certificates = []tls.Certificate{selfSigned(t, identity("web"))} },
		"an account's name": func(config *tls.Config) { config.Certificates = []tls.Certificate{selfSigned(t, "https://web")} },
	} {
		t.Run(name, func(t *testing.T) {
			socket, err := handshake(t, far, func(config *tls.Config) {
				config.Certificates = []tls.Certificate{certificate}
				change(config)
			})
			if err != nil {
				return
			}
			// With TLS 1.3 a client hears of the refusal of its certificate only when it reads.
			if err := socket.SetReadDeadline(time.Now().Add(wait)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(socket, http2.ClientPreface); err == nil {
				_, err = socket.Read(make([]byte, 1))
				if timeout, is := err.(net.Error); err == nil || is && timeout.Timeout() {
					t.Errorf("let in: %v", err)
				}
			}
		})
	}
	// Whom it lets in does not depend on the name that a client asks for.
	socket, err := handshake(t, far, func(config *tls.Config) {
		config.Certificates, config.ServerName = []tls.Certificate{certificate}, "web.example"
	})
	if err != nil {
		t.Fatal(err)
	}
	same(t, "version", socket.ConnectionState().Version, tls.VersionTLS13)
}

func selfSigned(t *testing.T, uri string) tls.Certificate {
	t.Helper()
	parsed, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{parsed}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
