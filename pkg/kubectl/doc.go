// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kubectl asks a cluster by running kubectl, with the flags, the credentials and the permissions of the user.
//
// Arguments are passed as they are, never through a shell. Names are given as KIND/NAME, so that none is taken for a
// flag. Of objects it reads only the fields that it has a use for; kubectl -o json keeps their names and meanings.
//
// kubectl exits with the code of a command that it executed in a container, and with 1 if it fails itself. Only the
// last line of its standard error tells the one from the other: "command terminated with exit code N".
package kubectl
