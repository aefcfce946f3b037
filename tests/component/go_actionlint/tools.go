//go:build tools

// actionlint, so that go.mod and go.sum pin it.
package tools

import _ "github.com/rhysd/actionlint/cmd/actionlint"
