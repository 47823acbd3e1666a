// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package webpage shows a node in a browser: how well the plugin's requirements are met, the pool, volumes, templates,
// contents and goldens, and the CSI calls of late.
//
// The page is one file, page.html, with its style and its script inside. It asks for the same JSON as the operator's
// commands, every 2 s, at the paths that the admin socket has, and shows when no answer comes. It loads nothing
// from elsewhere, and nothing can be changed through it: only GET and HEAD are answered.
//
// Names of pods, labels and errors are other people's text. The script sets all of it as text, never as markup. The
// page's Content-Security-Policy allows the one script and the one style by their digests, and markup made of strings
// is refused by the browser (Trusted Types).
//
// Caveat: whoever reaches the page reads names of pods and volumes. It asks for no password. So it belongs on a
// loopback address, which kubectl port-forward reaches. A web site that a browser of that machine has open could
// reach it as well, by a name that suddenly means 127.0.0.1. So a request must name the page by an IP address, as
// localhost, or by the host that the page listens on.
//
// Sources: Content Security Policy Level 3, for digests; RFC 9110, 15.5.20, for the status of a wrong host; CSI calls
// are those of package admin.
package webpage
