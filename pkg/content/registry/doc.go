// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package registry pulls images and artifacts from OCI registries, and keeps their blobs in the pool.
//
// [Client.Resolve] turns a tag into the digest of one manifest. [Client.Pull] gets that manifest, its
// config and its layers. Every blob is a file that has its digest as its name, so a blob is pulled
// once for all images that have it, and an image that is there needs no registry. What is pulled is
// data: nothing of it runs on the node, and nothing here looks into a layer.
//
// A blob has no name until it is whole, verified and synced. So a crash leaves nothing behind, and
// nothing of a download outlives the process. Within the process a download that breaks goes on
// where it was.
//
// What a registry says is not trusted. A blob must have the digest and the size that its manifest
// says, and a manifest the digest that was asked for. Numbers and sizes are bounded before anything
// is written. A registry that sends nothing for [Config.Idle] is given up. Redirects must keep to
// https, and lead neither to link-local addresses nor, unless the operator named such a host, to this
// node. Credentials go to their registry and to the token server that it names, and nowhere else.
// Errors and logs have neither credentials nor words that a server chose.
//
// Caveats: a registry by HTTP can be read and denied by everybody in between, but not forged where
// the reference has a digest. The platform of an image that is in no index is not compared with this
// machine's.
//
// The library is go-containerregistry, since it has what the tests need too: a registry, and images
// to push into it. oras-go can read ranges by itself, and has no registry; a program with either is
// equally large. Of the library only names, types and the handshake are used, since its own pull can
// neither resume nor keep what it got.
//
// Sources: the OCI distribution and image specifications (github.com/opencontainers), RFC 9110 for
// ranges, docker's config.json (docs.docker.com/reference/cli/docker).
package registry
