// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// value is the typed value of a flag. It is read and checked while pflag parses the
// command line, and nowhere else.
//
// A bad value is remembered here and not returned to pflag, which stops at the first
// error: the user would learn of a second mistake only after correcting the first.
// [refuse] reports all of them before a command does anything.
type value[T any] struct {
	kind[T]
	to   *T
	text string // as the user wrote it
	err  error  // why the text is refused
}

// kind is what the values of a flag have in common.
type kind[T any] struct {
	name  string // in --help, beside the flag
	read  func(text string) (T, error)
	words []string // all values, where these are few: for completion
}

func (v *value[T]) String() string { return v.text }
func (v *value[T]) Type() string   { return v.kind.name }

// Set implements [pflag.Value]. It never fails, see [value].
func (v *value[T]) Set(text string) error {
	v.text = text
	*v.to, v.err = v.read(text)
	return nil
}

func (v *value[T]) refusal() error    { return v.err }
func (v *value[T]) choices() []string { return v.words }

// addValue adds a flag with a typed value. The default is checked like any other value: it
// may come from the environment, and that of a required flag is the empty text.
func addValue[T any](f *pflag.FlagSet, to *T, name, text string, k kind[T], usage string) {
	addValueP(f, to, name, "", text, k, usage)
}

// addValueP is addValue for a flag with a shorthand, like the functions of pflag with a P.
func addValueP[T any](f *pflag.FlagSet, to *T, name, shorthand, text string, k kind[T], usage string) {
	v := &value[T]{kind: k, to: to}
	v.Set(text)
	if text == "" && v.err != nil {
		usage += " (required)"
	}
	f.VarP(v, name, shorthand, usage)
}

// refuse returns an error that names every flag with a bad value, or nil if there is none.
func refuse(f *pflag.FlagSet) error {
	var errs []error
	f.VisitAll(func(f *pflag.Flag) {
		if v, ok := f.Value.(interface{ refusal() error }); ok && v.refusal() != nil {
			errs = append(errs, badFlag(f.Name, f.Value.String(), v.refusal()))
		}
	})
	return errors.Join(errs...)
}

// badFlag is the form of every error about the value of a flag.
func badFlag(name, text string, err error) error {
	return fmt.Errorf("--%s %q: %w", name, text, err)
}

// flagError gives pflag's own errors the form of the others: about unknown flags, and about
// the values that pflag and klog read themselves.
func flagError(cmd *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	var unset *pflag.ValueRequiredError
	switch {
	case errors.As(err, &invalid):
		return badFlag(invalid.GetFlag().Name, invalid.GetValue(), mustBe(invalid.GetFlag()))
	case errors.As(err, &unset):
		return fmt.Errorf("--%s: its value is missing; `%s --help` says what it is", unset.GetFlag().Name, cmd.CommandPath())
	}
	return fmt.Errorf("%w; `%s --help` lists the flags", err, cmd.CommandPath())
}

// mustBe says what the value of a flag must be that pflag or klog reads itself.
func mustBe(f *pflag.Flag) error {
	must := map[string]string{
		"bool":           "must be true or false",
		"Level":          "must be a whole number, as 4",
		"moduleSpec":     "must be a list of FILE=LEVEL with commas between, as sweep=4",
		"stringToString": "must be NAME=VALUE, as inode-size=512",
	}[f.Value.Type()]
	return errors.New(cmp.Or(must, "is not what this flag takes"))
}

// kindOf makes a kind whose bad values are all refused with the same words.
func kindOf[T any](name, must string, read func(string) (T, bool)) kind[T] {
	return kind[T]{name: name, read: func(text string) (v T, err error) {
		v, ok := read(text)
		if !ok {
			return v, errors.New(must)
		}
		return v, nil
	}}
}

// sizeKind is [kindOf] for sizes. The error also names the quantity that may be meant.
func sizeKind[T any](name, must string, read func(string) (T, bool)) kind[T] {
	return kind[T]{name: name, read: func(text string) (T, error) {
		v, ok := read(text)
		if !ok {
			return v, errors.New(must + size.Hint(text))
		}
		return v, nil
	}}
}

const mustBeQuantity = "must be a quantity, as 512Mi or 10Gi,"

var (
	// upperSize is the largest size or sum of sizes that is allowed.
	upperSize = sizeKind("size", mustBeQuantity+" and not negative; 0 means no limit", func(s string) (int64, bool) {
		bytes, err := size.Parse(s)
		return bytes, err == nil && bytes >= 0
	})
	// optionalSize is a size of something that is not wanted if the text is empty.
	optionalSize = sizeKind("size", mustBeQuantity+" and more than 0", func(s string) (int64, bool) {
		if s == "" {
			return 0, true
		}
		bytes, err := size.Parse(s)
		return bytes, err == nil && bytes > 0
	})
	// poolShare is an amount of the pool's space.
	poolShare = sizeKind("share", "must be a quantity, as 10Gi, or a percentage below 100%, as 5%, and not negative", func(s string) (size.Share, bool) {
		share, err := size.ParseShare(s)
		return share, err == nil
	})
	atLeastOne = kindOf("int", "must be a whole number of at least 1", func(s string) (int, bool) {
		n, err := strconv.ParseInt(s, 0, strconv.IntSize)
		return int(n), err == nil && n >= 1
	})
	// factor multiplies sizes, which must stay in the range of int64. The comparison also
	// refuses NaN.
	factor = kindOf("float", "must be a number of at least 1 and at most 1000", func(s string) (float64, bool) {
		x, err := strconv.ParseFloat(s, 64)
		return x, err == nil && x >= 1 && x <= 1000
	})
	timeLimit = kindOf("duration", "must be a duration of more than 0, as 90s or 2m", func(s string) (time.Duration, bool) {
		d, err := time.ParseDuration(s)
		return d, err == nil && d > 0
	})
	// interval is the time between two of something that may not be wanted at all.
	interval = kindOf("duration", "must be a duration that is not negative, as 90s or 10m; 0 means never", func(s string) (time.Duration, bool) {
		d, err := time.ParseDuration(s)
		return d, err == nil && d >= 0
	})
)

// specList is a list of the contents of disks. The error names the one that is wrong.
var specList = kind[[]diskfs.Spec]{name: "list", read: func(s string) (specs []diskfs.Spec, err error) {
	if s == "" {
		return nil, nil
	}
	for text := range strings.SplitSeq(s, ",") {
		text = strings.TrimSpace(text)
		spec, err := diskfs.ParseSpec(text)
		if err != nil {
			return nil, fmt.Errorf("%.64q: %w", text, err)
		}
		specs = append(specs, spec)
	}
	return specs, nil
}}

// hostList is a list of hosts, each with a port or without.
var hostList = kindOf("list", "must be HOST:PORT, with commas between, as registry.ci:5000,10.0.0.7:80", func(s string) (hosts []string, ok bool) {
	if s == "" {
		return nil, true
	}
	for host := range strings.SplitSeq(s, ",") {
		if !hostPattern.MatchString(host) {
			return nil, false
		}
		hosts = append(hosts, host)
	}
	return hosts, true
})

var hostPattern = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?$`)

// upperCount is the largest number of things that is allowed.
func upperCount[T int | int64]() kind[T] {
	return kindOf("int", "must be a whole number that is not negative; 0 means no limit", func(s string) (T, bool) {
		n, err := strconv.ParseInt(s, 0, 64)
		return T(n), err == nil && n >= 0 && int64(T(n)) == n
	})
}

// optionalListener is a TCP address to listen on, in the form of [net.Listen]. Nothing is
// served if the text is empty.
var optionalListener = kindOf("address", "must be ADDRESS:PORT, as 10.0.0.7:9808 or fd00::7:9808, or :PORT for every address, as :9808", func(s string) (string, bool) {
	if s == "" {
		return "", true
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port, err = splitBare(s)
	}
	if err != nil {
		return "", false
	}
	_, err = strconv.ParseUint(port, 10, 16)
	return net.JoinHostPort(host, port), err == nil
})

// splitBare splits an IPv6 address without brackets from the port behind it. Kubernetes puts
// a pod's address into $(POD_IP):9808 as it is, and the manifest is the same for IPv4 and IPv6.
func splitBare(s string) (host, port string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", errors.New("there is no port")
	}
	_, err = netip.ParseAddr(s[:i])
	return s[:i], s[i+1:], err
}

// oneOf is one of a few words.
func oneOf[T ~string](words ...T) kind[T] {
	var names []string
	for _, w := range words {
		names = append(names, string(w))
	}
	k := kindOf(strings.Join(names, "|"), "must be one of "+strings.Join(names, ", "), func(s string) (T, bool) {
		return T(s), slices.Contains(names, s)
	})
	k.words = names
	return k
}

// given is a text that must not be empty.
func given(must string) kind[string] {
	return kindOf("string", must, func(s string) (string, bool) { return s, s != "" })
}

// checked is a text that a room checks.
func checked(check func(string) error) kind[string] {
	return kind[string]{name: "string", read: func(s string) (string, error) { return s, check(s) }}
}
