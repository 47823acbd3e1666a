// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package torture shows that the plugin loses nothing and leaves nothing, whatever ends
// it and whatever fails: it is killed before each of its effects in turn, and at random
// under load; each effect is made to fail; the power is cut.
//
// All of it is in its tests, with the tag "system". How long they go on, and from which
// seed, is in the environment: see the targets torture and powercut of the Makefile.
package torture
