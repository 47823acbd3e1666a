// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"errors"
	"strings"
)

// advised is an error with what to do about it.
type advised struct {
	error
	remedy string
}

// Advise adds what to do to an error. The text of the result has both, with a semicolon between.
func Advise(err error, remedy string) error { return &advised{err, remedy} }

func (a *advised) Error() string { return a.error.Error() + "; " + a.remedy }
func (a *advised) Unwrap() error { return a.error }

// Advice takes the text of an error apart: what is wrong, and what [Advise] has added, which may be deep
// inside. remedy is "" if that is nothing.
func Advice(err error) (text, remedy string) {
	text = err.Error()
	if a := (*advised)(nil); errors.As(err, &a) {
		return strings.Replace(text, "; "+a.remedy, "", 1), a.remedy
	}
	return text, ""
}
