// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package kubectl

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var (
	// ErrMissing means that there is no kubectl.
	ErrMissing = errors.New("kubectl is not on PATH: install it, see https://kubernetes.io/docs/tasks/tools")
	// ErrForbidden means that the user lacks a permission, which the error names.
	ErrForbidden = errors.New("a permission is missing")
	// ErrNotFound means that the object does not exist.
	ErrNotFound = errors.New("it does not exist")
	// ErrNoAnswer means that kubectl did not end in the time that a [Client] gives it.
	ErrNoAnswer = errors.New("no answer")
	// ErrTooLong means that kubectl printed more than is read of it.
	ErrTooLong = errors.New("the answer is too long")
)

// What is read of a run of kubectl. 64 MiB are the pods of thousands of nodes. A container that something is executed in
// may print without an end.
const (
	mostOutput = 64 << 20
	mostErrors = 1 << 20 // on standard error
)

// grace is how long kubectl may take to end once it was told to. It ends at once, unless a pipe is stuck.
const grace = time.Second

// Client runs kubectl.
type Client struct {
	Flags   []string      // the user's own, as --context=NAME; each run has them
	Timeout time.Duration // of each run; 0 is none
}

// Failed is a run of kubectl that failed, or the command that it executed. It is one of the errors above where the
// cause is known.
type Failed struct {
	Code   int    // of the command in the container; 0 if kubectl itself failed
	Output []byte // standard output until then
	Text   string // what stood on standard error, in one line
	is     error
}

func (f *Failed) Error() string { return f.Text }
func (f *Failed) Unwrap() error { return f.is }

// Run runs kubectl, and returns what it prints. Its errors are [Failed], and those of the package.
func (c Client) Run(ctx context.Context, args ...string) ([]byte, error) {
	if c.Timeout > 0 {
		limited, cancel := context.WithTimeoutCause(ctx, c.Timeout, fmt.Errorf("%w within %s", ErrNoAnswer, c.Timeout))
		defer cancel()
		ctx = limited
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, "kubectl", arguments(c.Flags, args)...)
	cmd.WaitDelay = grace
	stdout, stderr := bounded{most: mostOutput, cancel: cancel}, bounded{most: mostErrors, cancel: cancel}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	switch {
	case err == nil:
		return stdout.text.Bytes(), nil
	case errors.Is(err, exec.ErrNotFound):
		return nil, ErrMissing
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	return nil, failure(stdout.text.Bytes(), cmp.Or(strings.TrimSpace(stderr.text.String()), err.Error()))
}

// bounded keeps what is written, and ends the run if it is more than that.
type bounded struct {
	text   bytes.Buffer // not embedded: its ReadFrom knows no bound
	most   int
	cancel context.CancelCauseFunc
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.text.Len()+len(p) > b.most {
		err := fmt.Errorf("%w: kubectl printed more than %d MiB", ErrTooLong, b.most>>20)
		b.cancel(err)
		return 0, err
	}
	return b.text.Write(p)
}

// arguments puts the user's flags before the "--" that ends kubectl's own.
func arguments(flags, args []string) []string {
	for i, arg := range args {
		if arg == "--" {
			all := append(append([]string{}, args[:i]...), flags...)
			return append(all, args[i:]...)
		}
	}
	return append(append([]string{}, args...), flags...)
}

// Get reads objects: kubectl get ARGS -o json.
func (c Client) Get(ctx context.Context, into any, args ...string) error {
	out, err := c.Run(ctx, append(append([]string{"get"}, args...), "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("kubectl get %s printed no JSON that can be read: %w", strings.Join(args, " "), err)
	}
	return nil
}

// Exec runs a command in a container of a pod, and returns what it prints on standard output.
func (c Client) Exec(ctx context.Context, p Pod, container string, command ...string) ([]byte, error) {
	in := []string{"exec", "-n", p.Meta.Namespace, "pod/" + p.Meta.Name, "-c", container, "--"}
	return c.Run(ctx, append(in, command...)...)
}

var (
	terminated = regexp.MustCompile(`\n?command terminated with exit code (\d+)$`)
	forbidden  = regexp.MustCompile(`cannot (\w+) resource "([^"]+)" in API group "([^"]*)"(?: in the namespace "([^"]+)")?`)
	logLine    = regexp.MustCompile(`^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ `)
	prefix     = regexp.MustCompile(`^(error: |Error from server( \(\w+\))?: )`)
)

// failure explains what kubectl says on standard error.
func failure(out []byte, text string) *Failed {
	f := &Failed{Output: out}
	if m := terminated.FindStringSubmatch(text); m != nil {
		f.Code, _ = strconv.Atoi(m[1])
		f.Text = inLine(strings.TrimSuffix(text, m[0]))
		return f
	}
	if m := forbidden.FindStringSubmatch(text); m != nil {
		f.is, f.Text = ErrForbidden, needs(m[1], m[2], m[3], m[4])
		return f
	}
	if strings.Contains(text, "(NotFound)") {
		f.is = ErrNotFound
	}
	f.Text = "kubectl: " + prefix.ReplaceAllString(inLine(text), "")
	return f
}

// needs says which permission is missing, and how to ask for it.
func needs(verb, resource, group, namespace string) string {
	if group != "" {
		resource += "." + group
	}
	where, role, flag := "in the whole cluster", "ClusterRole", " -A"
	if namespace != "" {
		where, role, flag = "in the namespace "+namespace, "Role", " -n "+namespace
	}
	return fmt.Sprintf("you may not %s %s %s: ask for a %s with that verb on that resource; "+
		"`kubectl auth can-i %s %s%s` says when you have it", verb, resource, where, role, verb, resource, flag)
}

// inLine joins the lines of a message. kubectl logs each of its tries before it says what is wrong; these lines are
// left out, unless there are no others.
func inLine(text string) string {
	var logged, said []string
	for line := range strings.Lines(text) {
		switch line = strings.TrimSpace(line); {
		case line == "":
		case logLine.MatchString(line):
			logged = append(logged, line)
		default:
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		said = logged
	}
	return strings.Join(said, "; ")
}
