// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package admin is how a node tells an operator what it has and what it does: its volumes,
// templates, snapshots, contents and goldens, the CSI calls of late, and what is wrong.
//
// All of it is plain data with JSON names that stay ([Plugin], [Volume], …). A [Node] answers. There
// are three: the running plugin, its [Client] at the other end of the socket, and a command that reads
// the pool of a plugin that does not run. So a command does not know which one it asks.
//
// The plugin serves the data as HTTP and JSON on a unix socket in the pool's directory, where commands
// find it without being told. Only root may connect. An answer is complete before its first byte is
// sent, and so a slow reader holds nothing.
//
// Caveat: secrets and tokens of requests never come here. [Calls] is given names and errors alone.
//
// Sources: unix(7); net/unix/af_unix.c, unix_bind_bsd, for the mode of a socket's file.
package admin
