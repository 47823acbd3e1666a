// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/selinux"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Kubelet adds the SELinux context of a pod to the mount options, since CSIDriver says seLinuxMount:
// true. All files of the volume then have that label, and nobody relabels them one by one. mount(8),
// context=.

// contextKey begins the mount option, and contextForm says what follows.
const (
	contextKey  = "context="
	contextForm = "user:role:type or user:role:type:level"
)

// otherContexts are the other options that mount(8) has for SELinux.
var otherContexts = []string{"fscontext=", "defcontext=", "rootcontext="}

// maxContext is the longest string that fsconfig(2) takes, in bytes.
const maxContext = 255

var contextPattern = regexp.MustCompile(`^[A-Za-z0-9_.-]+(:[A-Za-z0-9_.-]+){2}(:[A-Za-z0-9_.-]+(:[A-Za-z0-9_.,-]+){0,2})?$`)

// parseContext reads the value of the mount option, with double quotes around it or without, and
// returns it as the kernel shows it.
func parseContext(value string) (string, error) {
	bare := value
	if len(value) > 1 && strings.HasPrefix(value, `"`) && strings.HasSuffix(value, `"`) {
		bare = value[1 : len(value)-1]
	}
	if len(bare) > maxContext || !contextPattern.MatchString(bare) {
		return "", fmt.Errorf("%w: mount option context (in mountOptions) %.64q: must be %s, of letters, "+
			"digits, '_', '.' and '-', with ':' and ',' in the level, and have at most %d bytes",
			errdefs.ErrInvalid, value, contextForm, maxContext)
	}
	return asShown(bare), nil
}

// asShown is a context as the kernel shows it, so that it can be compared with that of a mount. It
// writes categories in their order and without gaps: s0:c2,c1 becomes s0:c1,c2, and s0-s0 becomes
// s0. OpenShift, for example, writes the larger category first.
//
// Caveat: types that are aliases, and categories with other names than c0, c1 and so on, need the
// policy for that. They stay as they are.
//
// mls_sid_to_context in security/selinux/ss/mls.c
func asShown(context string) string {
	parts := strings.SplitN(context, ":", 4)
	if len(parts) < 4 {
		return context
	}
	low, high, isRange := strings.Cut(parts[3], "-")
	low, high = levelAsShown(low), levelAsShown(high)
	parts[3] = low
	if isRange && high != low {
		parts[3] += "-" + high
	}
	return strings.Join(parts, ":")
}

func levelAsShown(level string) string {
	sensitivity, list, _ := strings.Cut(level, ":")
	categories, ok := categoriesOf(list)
	if !ok || len(categories) == 0 {
		return level
	}
	var words []string
	for i := 0; i < len(categories); {
		first, last := categories[i], categories[i]
		for i++; i < len(categories) && categories[i] == last+1; i++ {
			last++
		}
		words = append(words, fmt.Sprint("c", first))
		switch {
		case last-first > 1:
			words[len(words)-1] += fmt.Sprint(".c", last)
		case last > first:
			words = append(words, fmt.Sprint("c", last))
		}
	}
	return sensitivity + ":" + strings.Join(words, ",")
}

var categoryPattern = regexp.MustCompile(`^c(0|[1-9][0-9]{0,3})(?:\.c(0|[1-9][0-9]{0,3}))?$`)

// categoriesOf returns the categories in a list, sorted. ok is false if it has other names.
func categoriesOf(list string) (categories []int, ok bool) {
	if list == "" {
		return nil, true
	}
	for _, word := range strings.Split(list, ",") {
		m := categoryPattern.FindStringSubmatch(word)
		if m == nil {
			return nil, false
		}
		first, _ := strconv.Atoi(m[1])
		last := first
		if m[2] != "" {
			last, _ = strconv.Atoi(m[2])
		}
		if last < first {
			return nil, false
		}
		for c := first; c <= last; c++ {
			categories = append(categories, c)
		}
	}
	slices.Sort(categories)
	return slices.Compact(categories), true
}

// contextOf returns the context among the options of a mounted filesystem, or "".
func contextOf(options string) string {
	for _, word := range mount.SplitOptions(options) {
		if value, ok := strings.CutPrefix(word, contextKey); ok {
			return value
		}
	}
	return ""
}

// Label gives the image itself the context that its pod has, if that has one. A [ModeDiskImage]
// volume shows the file, with its own label. The label stays, and another pod's takes its place.
func (img *Image) Label(context string) error {
	err := selinux.SetLabel(img.File, context)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return fmt.Errorf("%w: volume %s: the filesystem of the pool takes no SELinux labels (%w); mount it without the "+
			"option context", errdefs.ErrState, img.ID(), err)
	}
	return err
}
