// Package foreign talks to Ambit in the field's wire formats with parts that share no code with it: Istio's and
// Envoy's published messages, Go's gRPC, TLS and HTTP/2.
//
//	cluster_test.go      the running cluster: tokens, roots, objects, through kubectl
//	discovery_test.go    delta xDS against the controller
//	certificate_test.go  certificate signing against the controller
//	hbone_test.go        HBONE against the proxies, frame by frame
package foreign

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

const (
	system    = "ambit-system"
	audience  = "istio-ca"
	host      = "ambit-controller.ambit-system.svc"
	mesh      = "foreign"
	outside   = "foreign-plain"
	node1     = "node-1"
	node2     = "node-2"
	wait      = 20 * time.Second
	withLabel = "istio.io/dataplane-mode=ambient"
)

// kubectl runs it to its end, with input on its standard input.
func kubectl(t *testing.T, input string, arguments ...string) string {
	t.Helper()
	out, err := tryKubectl(input, arguments...)
	if err != nil {
		t.Fatalf("kubectl %s: %v", strings.Join(arguments, " "), err)
	}
	return out
}

func tryKubectl(input string, arguments ...string) (string, error) {
	program := os.Getenv("AMBIT_KUBECTL")
	if program == "" {
		return "", fmt.Errorf("AMBIT_KUBECTL is not set: run these tests with tests/run-cluster-rings, they need its cluster")
	}
	command := exec.Command(program, arguments...)
	command.Stdin = strings.NewReader(input)
	var said strings.Builder
	command.Stderr = &said
	out, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, said.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func field(t *testing.T, path string, arguments ...string) string {
	t.Helper()
	return kubectl(t, "", append([]string{"get", "-o", "jsonpath={" + path + "}"}, arguments...)...)
}

// eventually tries until there is nothing wrong any more.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(wait); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("after %v: %s: %v", wait, what, err)
}

// pod is what a test deploys: podtool's servers under a service account of the pod's name.
func pod(namespace, name, node string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: ServiceAccount
metadata: {name: %[2]s, namespace: %[1]s}
---
apiVersion: v1
kind: Pod
metadata:
  name: %[2]s
  namespace: %[1]s
  labels: {app: %[2]s, app.kubernetes.io/name: %[2]s-app, app.kubernetes.io/version: v7}
spec:
  nodeName: %[3]s
  serviceAccountName: %[2]s
  terminationGracePeriodSeconds: 0
  containers: [{name: podtool, image: 'docker.io/ambit/podtool:dev', imagePullPolicy: Never, args: [serve]}]
---
`, namespace, name, node)
}

func service(namespace, name, spec string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec: %s
---
`, name, namespace, spec)
}

var stage struct {
	sync.Once
	err error
}

// setStage brings up the pods that most tests speak of: web (node 1) and far (node 2) in the mesh, plain outside.
func setStage(t *testing.T) {
	t.Helper()
	stage.Do(func() { stage.err = buildStage() })
	if stage.err != nil {
		t.Fatal(stage.err)
	}
}

func buildStage() error {
	manifests := fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: %s}
---
`, mesh, outside) +
		pod(mesh, "web", node1) + pod(mesh, "far", node2) + pod(outside, "plain", node1) +
		service(mesh, "web", `{ipFamilyPolicy: PreferDualStack, selector: {app: web},
  ports: [{name: tcp, port: 90, targetPort: 9000}, {name: http, port: 80, targetPort: 8080, appProtocol: http}]}`) +
		service(mesh, "headless", `{clusterIP: None, selector: {app: far}, ports: [{port: 9000}]}`) +
		service(mesh, "close", `{selector: {app: far}, trafficDistribution: PreferSameZone, ports: [{port: 9000}]}`) +
		service(mesh, "local", `{selector: {app: far}, internalTrafficPolicy: Local, ports: [{port: 9000}]}`) +
		service(mesh, "early", `{selector: {app: far}, publishNotReadyAddresses: true, ports: [{port: 9000}]}`)
	if _, err := tryKubectl(manifests, "apply", "-f", "-"); err != nil {
		return err
	}
	for _, namespace := range []string{mesh, outside} {
		_, err := tryKubectl("", "-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
		if err != nil {
			return err
		}
	}
	for end := time.Now().Add(wait); ; time.Sleep(100 * time.Millisecond) {
		missing := enrolledMissing("web", "far")
		if missing == nil {
			return nil
		}
		if time.Now().After(end) {
			return missing
		}
	}
}

// enrolledMissing says what keeps these pods of the mesh from being enrolled.
func enrolledMissing(names ...string) error {
	out, err := tryKubectl("", "get", "ambientnodes", "-o", "json")
	if err != nil {
		return err
	}
	var nodes struct {
		Items []struct {
			Spec struct {
				Workloads []struct{ Namespace, Name string }
			}
			Status struct {
				Pending []struct{ Namespace, Name string }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &nodes); err != nil {
		return err
	}
	state := map[string]bool{}
	for _, node := range nodes.Items {
		for _, workload := range node.Spec.Workloads {
			state[workload.Namespace+"/"+workload.Name] = true
		}
		for _, workload := range node.Status.Pending {
			state[workload.Namespace+"/"+workload.Name] = false
		}
	}
	for _, name := range names {
		if !state[mesh+"/"+name] {
			return fmt.Errorf("%s is not enrolled: %v", name, state)
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	status := m.Run()
	if _, err := tryKubectl("", "delete", "namespace", mesh, outside, "--ignore-not-found", "--wait=true"); err != nil {
		fmt.Fprintln(os.Stderr, "take down the stage:", err)
		status = 1
	}
	os.Exit(status)
}

func podIP(t *testing.T, namespace, name string) string {
	t.Helper()
	return field(t, ".status.podIP", "-n", namespace, "pod", name)
}

// systemPod is the pod of one of Ambit's programs on a node.
func systemPod(t *testing.T, program, node string) string {
	t.Helper()
	return field(t, ".items[0].metadata.name", "-n", system, "pods", "-l", "app.kubernetes.io/name="+program,
		"--field-selector=spec.nodeName="+node)
}

// token is the one that a node's proxy shows: bound to its pod, for the control plane.
func token(t *testing.T, node string) string {
	t.Helper()
	return kubectl(t, "", "-n", system, "create", "token", "ambit-proxy", "--audience", audience,
		"--bound-object-kind", "Pod", "--bound-object-name", systemPod(t, "ambit-proxy", node))
}

func roots(t *testing.T) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(field(t, `.data.root-cert\.pem`, "-n", system, "configmap", "ambit-ca-root"))) {
		t.Fatal("the published roots are no certificates")
	}
	return pool
}

// controller connects to one replica, by TLS and with the roots that it publishes.
func controller(t *testing.T) *grpc.ClientConn {
	t.Helper()
	ip := field(t, ".items[0].status.podIP", "-n", system, "pods", "-l", "app.kubernetes.io/name=ambit-controller")
	return dial(t, ip, credentials.NewTLS(&tls.Config{RootCAs: roots(t), ServerName: host, MinVersion: tls.VersionTLS12}))
}

func dial(t *testing.T, ip string, transport credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	connection, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(ip, "15012"), grpc.WithTransportCredentials(transport))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := connection.Close(); err != nil {
			t.Error(err)
		}
	})
	return connection
}

// as carries a token, as the field's proxies do; without one, nothing.
func as(t *testing.T, token string) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	if token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token, "clusterid", "Kubernetes")
}
