package foreign

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"
)

func identity(account string) string { return "spiffe://cluster.local/ns/" + mesh + "/sa/" + account }

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// csr asks as the field's proxies do: an empty subject, and one URI if one is given.
func csr(t *testing.T, key crypto.Signer, template x509.CertificateRequest, uris ...string) string {
	t.Helper()
	for _, uri := range uris {
		parsed, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, parsed)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// create asks for a certificate of an identity in the name of a pod's, as a proxy that several pods share does.
func create(ctx context.Context, t *testing.T, csr, identity string, seconds int64) ([]string, error) {
	t.Helper()
	request := &security.IstioCertificateRequest{Csr: csr, ValidityDuration: seconds}
	if identity != "" {
		request.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			"ImpersonatedIdentity": structpb.NewStringValue(identity),
		}}
	}
	answer, err := security.NewIstioCertificateServiceClient(controller(t)).CreateCertificate(ctx, request)
	return answer.GetCertChain(), err
}

func parse(t *testing.T, text string) []*x509.Certificate {
	t.Helper()
	var all []*x509.Certificate
	for rest := []byte(text); ; {
		block, next := pem.Decode(rest)
		if block == nil {
			return all
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all, rest = append(all, certificate), next
	}
}

// credential is a certificate of one of the mesh's identities, signed by the controller for the node it runs on.
func credential(t *testing.T, account, node string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	chain, err := create(as(t, token(t, node)), t, csr(t, key, x509.CertificateRequest{}, identity(account)), identity(account), 3600)
	if err != nil {
		t.Fatal(err)
	}
	certificate := tls.Certificate{PrivateKey: key}
	for _, entry := range chain[:len(chain)-1] {
		for _, parsed := range parse(t, entry) {
			certificate.Certificate = append(certificate.Certificate, parsed.Raw)
		}
	}
	return certificate
}

func TestACertificateHasTheIdentityAndKeyAskedForAndLeadsToTheRoots(t *testing.T) {
	setStage(t)
	key := newKey(t)
	chain, err := create(as(t, token(t, node1)), t, csr(t, key, x509.CertificateRequest{}, identity("web")), identity("web"), 3600)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) < 2 {
		t.Fatalf("a chain of %d: the leaf comes first, the roots last", len(chain))
	}
	leaves := parse(t, chain[0])
	if len(leaves) != 1 {
		t.Fatalf("%d certificates in the first element", len(leaves))
	}
	leaf := leaves[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != identity("web") || len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 {
		t.Errorf("names: %v %v %v", leaf.URIs, leaf.DNSNames, leaf.IPAddresses)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("it is of another key")
	}
	if leaf.IsCA || len(leaf.Subject.Names) != 0 {
		t.Errorf("CA %v, subject %v", leaf.IsCA, leaf.Subject)
	}
	if lasts := leaf.NotAfter.Sub(time.Now()); lasts > time.Hour+time.Minute || lasts < 50*time.Minute {
		t.Errorf("an hour was asked for, it lasts %v", lasts)
	}
	last, between := x509.NewCertPool(), x509.NewCertPool()
	if !last.AppendCertsFromPEM([]byte(chain[len(chain)-1])) {
		t.Fatal("no roots in the last element")
	}
	for _, entry := range chain[1 : len(chain)-1] {
		between.AppendCertsFromPEM([]byte(entry))
	}
	for name, pool := range map[string]*x509.CertPool{"returned": last, "published": roots(t)} {
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			options := x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}
			if _, err := leaf.Verify(options); err != nil {
				t.Errorf("by the %s roots, use %v: %v", name, usage, err)
			}
		}
	}
}

func TestWhatACSRSaysOfItselfDoesNotCount(t *testing.T) {
	setStage(t)
	wanted := x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "cluster-admin", Organization: []string{"system:masters"}},
		DNSNames: []string{host},
	}
	request := csr(t, newKey(t), wanted, identity("far"), "spiffe://cluster.local/ns/kube-system/sa/root")
	chain, err := create(as(t, token(t, node1)), t, request, identity("web"), 3600)
	if status.Code(err) == codes.InvalidArgument {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	leaf := parse(t, chain[0])[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != identity("web") || len(leaf.DNSNames) != 0 || len(leaf.Subject.Names) != 0 {
		t.Errorf("%v %v %v", leaf.URIs, leaf.DNSNames, leaf.Subject)
	}
}

func TestTheTimeAskedForIsKeptWithinBounds(t *testing.T) {
	setStage(t)
	const day = 24 * time.Hour
	for asked, most := range map[int64]time.Duration{1 << 40: day, -5: day, 0: day, 600: 10 * time.Minute} {
		request := csr(t, newKey(t), x509.CertificateRequest{}, identity("web"))
		chain, err := create(as(t, token(t, node1)), t, request, identity("web"), asked)
		if err != nil {
			t.Errorf("%d s: %v", asked, err)
			continue
		}
		leaf := parse(t, chain[0])[0]
		if lasts := time.Until(leaf.NotAfter); lasts <= 0 || lasts > most+time.Minute {
			t.Errorf("%d s were asked for: it lasts %v", asked, lasts)
		}
	}
}

func TestCertificatesAreRefusedWithTheCodeThatFits(t *testing.T) {
	setStage(t)
	key := newKey(t)
	good := csr(t, key, x509.CertificateRequest{}, identity("web"))
	forged := forge(t, good)
	proxy := token(t, node1)
	for name, test := range map[string]struct {
		token, csr, identity string
		code                 codes.Code
		words                string
	}{
		"no token":                {"", good, identity("web"), codes.Unauthenticated, "token"},
		"a token that is none":    {"e30.e30.e30", good, identity("web"), codes.Unauthenticated, "token"},
		"another audience":        {otherAudience(t), good, identity("web"), codes.Unauthenticated, "token"},
		"another account":         {otherAccount(t), good, identity("web"), codes.Unauthenticated, "ambit-node-agent"},
		"a pod of another node":   {proxy, good, identity("far"), codes.PermissionDenied, "no enrolled pod on node node-1"},
		"a pod outside the mesh":  {proxy, good, "spiffe://cluster.local/ns/" + outside + "/sa/plain", codes.PermissionDenied, "plain"},
		"nobody":                  {proxy, good, identity("nobody"), codes.PermissionDenied, "nobody"},
		"the proxy itself":        {proxy, good, "spiffe://cluster.local/ns/ambit-system/sa/ambit-proxy", codes.PermissionDenied, "ambit-proxy"},
		"another trust domain":    {proxy, good, "spiffe://elsewhere/ns/" + mesh + "/sa/web", codes.PermissionDenied, "elsewhere"},
		"no identity":             {proxy, good, "", codes.InvalidArgument, "ImpersonatedIdentity"},
		"what is no identity":     {proxy, good, "spiffe://cluster.local/web", codes.InvalidArgument, "spiffe"},
		"an identity with a tail": {proxy, good, identity("web") + "/x", codes.InvalidArgument, "spiffe"},
		"no CSR":                  {proxy, "", identity("web"), codes.InvalidArgument, "request"},
		"no PEM":                  {proxy, "hello", identity("web"), codes.InvalidArgument, "request"},
		"a certificate as CSR":    {proxy, field(t, `.data.root-cert\.pem`, "-n", system, "configmap", "ambit-ca-root"), identity("web"), codes.InvalidArgument, "request"},
		"a wrong signature":       {proxy, forged, identity("web"), codes.InvalidArgument, "signature"},
		"a huge CSR":              {proxy, strings.Repeat("A", 3<<20), identity("web"), codes.OutOfRange, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := create(as(t, test.token), t, test.csr, test.identity, 3600)
			said := status.Convert(err)
			if said.Code() != test.code || !strings.Contains(said.Message(), test.words) {
				t.Errorf("wanted %v with %q, got %v: %s", test.code, test.words, said.Code(), said.Message())
			}
		})
	}
}

// forge changes a byte of a CSR's signature.
func forge(t *testing.T, request string) string {
	t.Helper()
	block, _ := pem.Decode([]byte(request))
	changed := bytes.Clone(block.Bytes)
	changed[len(changed)-1] ^= 1
	return string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: changed}))
}

func otherAudience(t *testing.T) string {
	t.Helper()
	return kubectl(t, "", "-n", system, "create", "token", "ambit-proxy",
		"--bound-object-kind", "Pod", "--bound-object-name", systemPod(t, "ambit-proxy", node1))
}

func otherAccount(t *testing.T) string {
	t.Helper()
	return kubectl(t, "", "-n", system, "create", "token", "ambit-node-agent", "--audience", audience,
		"--bound-object-kind", "Pod", "--bound-object-name", systemPod(t, "ambit-node-agent", node1))
}
