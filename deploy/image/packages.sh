#!/bin/sh
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Prints the packages that this architecture needs, one a line.
set -eu
arch=$(dpkg --print-architecture)
sed "/^#/d; s/ \[$arch\]\$//; /\[/d" "$(dirname "$0")/packages"
