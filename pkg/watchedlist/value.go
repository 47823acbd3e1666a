// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package watchedlist

import (
	"fmt"
	"regexp"
	"slices"
)

// show repeats a value in a message.
func show(value any) string {
	switch v := value.(type) {
	case string:
		return fmt.Sprintf("%.64q", v)
	case []any:
		return "(a list)"
	case map[string]any:
		return "(a map)"
	case nil:
		return "(empty)"
	}
	return fmt.Sprintf("%.64s", fmt.Sprint(value))
}

// Text returns a value that is a string. The error says what it must be.
func Text(value any, want string) (string, error) {
	s, ok := value.(string)
	if !ok {
		return "", fmt.Errorf("must be %s, in quotes", want)
	}
	return s, nil
}

// dnsLabel is a DNS label, which a namespace's name is too: RFC 1123.
var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

const wantLabel = "1 to 63 lower-case letters, digits and '-', not at either end"

func label(value any) (string, error) {
	name, err := Text(value, wantLabel)
	if err != nil {
		return "", err
	}
	if !dnsLabel.MatchString(name) {
		return "", fmt.Errorf("must be %s", wantLabel)
	}
	return name, nil
}

// Namespaces are namespaces of Kubernetes that may do something.
type Namespaces []string

// Everybody stands for all namespaces, and for who has none.
const Everybody = "*"

// Allow reports whether a namespace is among them. An empty one is that of who has none.
func (n Namespaces) Allow(namespace string) bool {
	return slices.Contains(n, Everybody) || namespace != "" && slices.Contains(n, namespace)
}

// ParseNamespaces reads a value that is a list of at least one namespace, or of [Everybody].
func ParseNamespaces(value any) (n Namespaces, err error) {
	want := fmt.Errorf(`must be a list of namespaces, each %s, or %q for all`, wantLabel, Everybody)
	list, ok := value.([]any)
	if !ok || len(list) == 0 {
		return nil, want
	}
	for _, v := range list {
		name, ok := v.(string)
		if !ok || name != Everybody && !dnsLabel.MatchString(name) {
			return nil, fmt.Errorf("%s is no namespace: %w", show(v), want)
		}
		n = append(n, name)
	}
	return n, nil
}
