package policy

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/loader"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/writsec/writ/bundles"
)

// snapshot is one version of the policies, compiled and prepared. It never
// changes, so readers need no lock and a new version never makes one wait.
type snapshot struct {
	Version
	at              time.Time // put in force
	decision, admin question
}

// question is one that policies answer.
type question struct {
	query    rego.PreparedEvalQuery
	schema   *jsonschema.Schema // of the answer
	failures failures
	defined  bool // some rule answers it
}

// failures are the reasons of the denials that policy did not give.
type failures struct{ undefined, failed, timeout, invalid string }

var (
	decisionFailures = failures{ReasonUndefined, ReasonError, ReasonTimeout, ReasonInvalidOutput}
	adminFailures    = failures{AdminUndefined, AdminError, AdminTimeout, AdminInvalidOutput}
)

const (
	maxBundle   = 64 << 20         // bytes of a bundle file
	testTimeout = 30 * time.Second // of one test; policies that need more are too slow to decide
	loadTimeout = 2 * time.Minute
)

// load reads a directory or a bundle file and passes it through every gate:
// signature, capabilities, strict compilation, schemas, the bundle's own tests.
func (e *Engine) load(ctx context.Context) (*snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()

	caps, err := ast.LoadCapabilitiesJSON(strings.NewReader(string(bundles.Capabilities)))
	if err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	b, err := e.read(caps)
	if err != nil {
		return nil, err
	}
	digest, err := digestOf(b)
	if err != nil {
		return nil, err
	}
	schemas, err := inputSchemas()
	if err != nil {
		return nil, err
	}
	compiler := func() *ast.Compiler {
		return ast.NewCompiler().WithCapabilities(caps).WithStrict(true).WithSchemas(schemas).
			WithUseTypeCheckAnnotations(true)
	}

	// Tests are for the gate alone: a test file must not add a rule to what decides.
	serving := *b
	serving.Modules = slices.DeleteFunc(slices.Clone(b.Modules), func(m bundle.ModuleFile) bool {
		return strings.HasSuffix(m.Path, "_test.rego")
	})
	store := newStore()
	c := compiler()
	if err := activate(ctx, store, c, &serving); err != nil {
		return nil, err
	}
	if err := runTests(ctx, compiler().WithEnablePrintStatements(true), b); err != nil {
		return nil, err
	}

	prepare := func(query string, schema *jsonschema.Schema, f failures) (q question, err error) {
		q = question{schema: schema, failures: f}
		if ref, err := ast.ParseRef(query); err == nil {
			q.defined = len(c.GetRulesWithPrefix(ref)) > 0
		}
		q.query, err = rego.New(
			rego.Query(query), rego.Compiler(c), rego.Store(store), rego.StrictBuiltinErrors(true),
		).PrepareForEval(ctx)
		if err != nil {
			return q, fmt.Errorf("prepare query %s: %w", query, err)
		}
		return q, nil
	}
	decision, err := prepare(e.cfg.Query, e.decision, decisionFailures)
	if err != nil {
		return nil, err
	}
	admin, err := prepare(e.cfg.AdminQuery, e.admin, adminFailures)
	if err != nil {
		return nil, err
	}
	revision := b.Manifest.Revision
	if revision == "" {
		revision = digest[len("sha256:"):][:12]
	}
	return &snapshot{Version: Version{revision, digest}, decision: decision, admin: admin}, nil
}

func (e *Engine) read(caps *ast.Capabilities) (*bundle.Bundle, error) {
	path, err := filepath.EvalSymlinks(e.cfg.Path) // the loader follows no link
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	if st.Size() > maxBundle {
		return nil, fmt.Errorf("read policies: %s is larger than %d bytes", e.cfg.Path, maxBundle)
	}
	if st.IsDir() && e.cfg.Verification != nil {
		return nil, errors.New("read policies: policy.signature is set, but a directory carries no signature: use a signed bundle")
	}
	l := loader.NewFileLoader().WithCapabilities(caps).WithProcessAnnotation(true).WithRegoVersion(ast.RegoV1)
	if e.cfg.Verification != nil {
		l = l.WithBundleVerificationConfig(e.cfg.Verification)
	} else {
		l = l.WithSkipBundleVerification(true)
	}
	b, err := l.AsBundle(path)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	if len(b.Modules) == 0 {
		return nil, fmt.Errorf("read policies: %s holds no Rego", e.cfg.Path)
	}
	return b, nil
}

func newStore() storage.Store {
	return inmem.NewWithOpts(inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))
}

func activate(ctx context.Context, store storage.Store, c *ast.Compiler, b *bundle.Bundle) error {
	err := storage.Txn(ctx, store, storage.WriteParams, func(txn storage.Transaction) error {
		return (&bundle.DefaultActivator{}).Activate(&bundle.ActivateOpts{
			Ctx: ctx, Store: store, Txn: txn, TxnCtx: storage.NewContext(), Compiler: c, Metrics: metrics.New(),
			Bundles:       map[string]*bundle.Bundle{"writ": b},
			ParserOptions: ast.ParserOptions{RegoVersion: ast.RegoV1, ProcessAnnotation: true},
		})
	})
	if err != nil {
		return fmt.Errorf("compile policies: %w", err)
	}
	return nil
}

// runTests runs the test rules that the policies bring along.
func runTests(ctx context.Context, c *ast.Compiler, b *bundle.Bundle) error {
	// The tester answers on a channel that must be drained, also after a failure.
	store := newStore()
	txn, err := store.NewTransaction(ctx, storage.WriteParams)
	if err != nil {
		return fmt.Errorf("test policies: %w", err)
	}
	defer store.Abort(context.WithoutCancel(ctx), txn)
	results, err := tester.NewRunner().SetCompiler(c).SetStore(store).SetTimeout(testTimeout).
		SetBundles(map[string]*bundle.Bundle{"writ": b}).CapturePrintOutput(true).RunTests(ctx, txn)
	if err != nil {
		return fmt.Errorf("test policies: %w", err)
	}
	var failed []string
	for r := range results {
		switch {
		case r == nil:
		case r.Error != nil:
			failed = append(failed, fmt.Sprintf("%s.%s (%v)", r.Package, r.Name, r.Error))
		case r.Fail:
			failed = append(failed, r.Package+"."+r.Name)
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("test policies: %w", err)
	}
	if len(failed) > 0 {
		slices.Sort(failed)
		return fmt.Errorf("test policies: %d failed (opa test on the same files tells more): %s", len(failed), strings.Join(failed, ", "))
	}
	return nil
}

// inputSchemas are what rules can name: schema.input, and schema.admin_input for those
// about operators.
func inputSchemas() (*ast.SchemaSet, error) {
	set := ast.NewSchemaSet()
	for _, name := range []string{"input", "admin_input"} {
		raw, err := bundles.Schemas.ReadFile("schemas/" + name + ".json")
		if err != nil {
			return nil, fmt.Errorf("input schema: %w", err)
		}
		var doc any
		if err := json.Unmarshal(raw, &doc); err != nil {
			return nil, fmt.Errorf("input schema: %w", err)
		}
		set.Put(ast.MustParseRef("schema."+name), doc)
	}
	return set, nil
}

// digestOf names the content: the same Rego and data have the same digest, be they
// a directory or a bundle.
func digestOf(b *bundle.Bundle) (string, error) {
	h := sha256.New()
	part := func(s []byte) {
		_ = binary.Write(h, binary.BigEndian, uint64(len(s))) // a hash never fails to write
		h.Write(s)
	}
	modules := slices.SortedFunc(slices.Values(b.Modules), func(x, y bundle.ModuleFile) int {
		return strings.Compare(x.RelativePath, y.RelativePath)
	})
	for _, m := range modules {
		part([]byte(strings.TrimPrefix(filepath.ToSlash(m.RelativePath), "/")))
		part(m.Raw)
	}
	data, err := json.Marshal(b.Data)
	if err != nil {
		return "", fmt.Errorf("digest policies: %w", err)
	}
	part(data)
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}

// fingerprint tells whether anything under path may have changed, without reading
// file contents.
func fingerprint(path string) string {
	h := sha256.New()
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	_ = filepath.WalkDir(path, func(p string, d os.DirEntry, err error) error {
		var info os.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		switch {
		case err != nil:
			fmt.Fprintln(h, p, "unreadable")
		case !d.IsDir():
			fmt.Fprintln(h, p, info.Size(), info.ModTime().UnixNano())
		}
		return nil // what can't be read counts as it is
	})
	return string(h.Sum(nil))
}
