//go:build tools

// crictl, so that go.mod and go.sum pin it.
package tools

import _ "sigs.k8s.io/cri-tools/cmd/crictl"
