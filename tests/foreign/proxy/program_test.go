// Package proxy shows ambit-proxy to a control plane and to peers of which nothing is ours: their messages, TLS and HTTP/2
// are those of Istio's, Envoy's and Go's own libraries. Only the node's agent, which is of Ambit alone, is played here.
//
//	client 10.1.0.1 ──mark──▶ TPROXY 15001 ─ ambit-proxy ──HBONE──▶ 10.2.0.1:15008, the peer
//	agent (Unix socket) ──▶ ambit-proxy ◀──TLS──▶ 127.0.0.1:15012, the control plane
//
// It runs in a network namespace of its own, which tests/foreign/run makes.
package proxy

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	clientIP  = "10.1.0.1"
	peerIP    = "10.2.0.1"
	serviceIP = "10.96.0.1"
	fromPod   = 0x777
	wait      = 10 * time.Second
)

func TestMain(m *testing.M) {
	commands := []string{
		"ip link set lo up",
		fmt.Sprintf("iptables -t mangle -A PREROUTING -i lo -p tcp -m mark --mark %#x -j TPROXY "+
			"--on-ip 127.0.0.1 --on-port 15001 --tproxy-mark 0x400/0xfff", fromPod),
	}
	// No device has them: they are not the proxy's own.
	for _, ip := range []string{clientIP, peerIP, serviceIP} {
		commands = append(commands, "ip route add local "+ip+"/32 dev lo")
	}
	for _, command := range commands {
		words := strings.Fields(command)
		if output, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v: %s\n", command, err, output)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// program is an ambit-proxy with its control plane.
type program struct {
	t      *testing.T
	folder string
	*controlPlane
}

// start runs the program; its agent has said that it serves the client's pod. Nothing is known of other pods yet.
func start(t *testing.T) *program {
	t.Helper()
	p := &program{t: t, folder: t.TempDir(), controlPlane: serveControlPlane(t)}
	must(t, os.WriteFile(p.file("root-cert.pem"), p.root.pem(), 0o600))
	must(t, os.WriteFile(p.file("token"), []byte(token), 0o600))
	p.serveAgent()
	log, err := os.Create(p.file("log"))
	must(t, err)
	command := exec.Command(os.Getenv("AMBIT_PROXY"),
		"--controller=https://localhost:15012", "--root-cert="+p.file("root-cert.pem"), "--token="+p.file("token"),
		"--agent-socket="+p.file("agent.sock"), "--pod-name=proxy-1", "--pod-uid=proxy-uid", "--pod-ip=10.3.0.1",
		"--node-name=node-1", "--drain-seconds=2")
	command.Stdout = log
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, command.Start())
	t.Cleanup(func() {
		// What it still has to say to its log it says at its end.
		_ = command.Process.Signal(syscall.SIGTERM)
		killed := time.AfterFunc(wait, func() { _ = command.Process.Kill() })
		_ = command.Wait()
		killed.Stop()
		_ = log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(p.file("log"))
			t.Logf("the program's log:\n%s", text)
		}
	})
	return p
}

func (p *program) file(name string) string { return filepath.Join(p.folder, name) }

// serveAgent tells the proxy once what the node wants of it, in the messages of protocol/proto/node.proto.
func (p *program) serveAgent() {
	listener, err := net.Listen("unix", p.file("agent.sock"))
	must(p.t, err)
	p.t.Cleanup(func() { listener.Close() })
	varint := func(to []byte, field protowire.Number, value uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(to, field, protowire.VarintType), value)
	}
	text := func(to []byte, field protowire.Number, value string) []byte {
		return protowire.AppendString(protowire.AppendTag(to, field, protowire.BytesType), value)
	}
	outbound := varint(varint(nil, 1, 1), 2, 15001)
	pod := text(text(text(text(text(nil, 1, "client-uid"), 2, "shop"), 3, "client"), 4, "client"), 5, clientIP)
	configure := text(text(varint(nil, 1, 1), 2, string(outbound)), 3, string(pod))
	message := text(nil, 1, string(varint(configure, 5, 2)))
	go func() {
		for {
			stream, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = stream.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...))
			go func() { _, _ = io.Copy(io.Discard, stream) }()
		}
	}()
}

// waitReady waits until the program serves its pod.
func (p *program) waitReady() {
	p.t.Helper()
	eventually(p.t, "the proxy is ready", func() error {
		answer, err := http.Get("http://127.0.0.1:15021/healthz/ready")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		body, _ := io.ReadAll(answer.Body)
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", body)
		}
		return nil
	})
}

// dial opens a connection of the pod, as its node redirects it.
func dial(t *testing.T, to string) net.Conn {
	t.Helper()
	dialer := net.Dialer{
		LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientIP)},
		Control: func(_, _ string, socket syscall.RawConn) error {
			var failed error
			err := socket.Control(func(fd uintptr) {
				failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, fromPod)
			})
			if err != nil {
				return err
			}
			return failed
		},
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	connection, err := dialer.DialContext(ctx, "tcp", to)
	must(t, err)
	must(t, connection.SetDeadline(time.Now().Add(wait)))
	t.Cleanup(func() { connection.Close() })
	return connection
}

// echoes shows that bytes go there and back.
func echoes(t *testing.T, connection net.Conn, text string) {
	t.Helper()
	_, err := io.WriteString(connection, text)
	must(t, err)
	back := make([]byte, len(text))
	_, err = io.ReadFull(connection, back)
	must(t, err)
	same(t, "what came back", string(back), text)
}

// refused shows that a connection ends with a reset, not as if all had been said.
func refused(t *testing.T, connection net.Conn) {
	t.Helper()
	_, err := io.ReadAll(connection)
	if err == nil || !strings.Contains(err.Error(), "connection reset by peer") {
		t.Fatalf("the connection ended with %v", err)
	}
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(wait); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func same[T comparable](t *testing.T, what string, have, want T) {
	t.Helper()
	if have != want {
		t.Fatalf("%s: %v, want %v", what, have, want)
	}
}
