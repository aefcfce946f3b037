//go:build tools

// The generators of the stubs, so that go.mod and go.sum pin them.
package main

import (
	_ "github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc"
	_ "google.golang.org/protobuf/cmd/protoc-gen-go"
)
