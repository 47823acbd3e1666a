// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package torture shows that the plugin loses nothing and leaves nothing, whatever ends it and whatever fails. It is
// killed before each of its effects in turn, and at random under load. Each effect is made to fail. The power is cut.
//
// The package has only tests, with the tag "system". COUNT and SEED in the environment say how long they go on and what
// their random numbers are; see the targets torture and powercut of the Makefile.
package torture
