// Drives an agent with containerd's ttrpc library, and prints the result of each step as JSON.
//
// Usage: driver SOCKET REQUEST.  REQUEST is a file with an encoded CreateContainerRequest whose process copies stdin to
// stdout.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"caisson.test/ttrpc/kata"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	atOnce    = 1000
	pieceSize = 32 << 10 // as in Kata's shim
	inputSize = 1 << 20
)

type outcome struct {
	Code string `json:"code"`
	Text string `json:"text"`
}

func of(err error) outcome {
	if errors.Is(err, context.DeadlineExceeded) {
		return outcome{codes.DeadlineExceeded.String(), ""}
	}
	return outcome{status.Code(err).String(), status.Convert(err).Message()}
}

func within(timeout time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	time.AfterFunc(timeout+time.Second, cancel) // after the deadline, which must be what cancels the call
	return ttrpc.WithMetadata(ctx, ttrpc.MD{"containerd-namespace-ttrpc": []string{"default"}})
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	conn, err := net.Dial("unix", os.Args[1])
	must(err)
	client := ttrpc.NewClient(conn)
	defer client.Close()
	agent, health := kata.NewAgentServiceClient(client), kata.NewHealthClient(client)
	container := &kata.CreateContainerRequest{}
	encoded, err := os.ReadFile(os.Args[2])
	must(err)
	must(proto.Unmarshal(encoded, container))

	results := map[string]any{}
	check, err := health.Check(within(30*time.Second), &kata.CheckRequest{})
	must(err)
	results["check"] = check.Status.String()
	results["errors"] = failures(client, agent)
	results["deadline"] = deadline(agent)
	results["at once"] = manyAtOnce(agent, health)
	results["copied"] = copied(agent, container)
	must(json.NewEncoder(os.Stdout).Encode(results))
}

func failures(client *ttrpc.Client, agent kata.AgentServiceService) map[string]outcome {
	ctx := within(30 * time.Second)
	_, noContainer := agent.StartContainer(ctx, &kata.StartContainerRequest{ContainerId: "no"})
	invalid := &kata.CheckRequest{Service: "bytes that are not a StatsContainerRequest"}
	return map[string]outcome{
		"no container":    of(noContainer),
		"unknown method":  of(client.Call(ctx, "grpc.AgentService", "Nothing", invalid, &kata.HealthCheckResponse{})),
		"unknown service": of(client.Call(ctx, "grpc.Nothing", "Check", invalid, &kata.HealthCheckResponse{})),
		"too long": of(client.Call(ctx, "grpc.Health", "Check",
			&kata.CheckRequest{Service: string(bytes.Repeat([]byte("x"), 5<<20))}, &kata.HealthCheckResponse{})),
	}
}

// deadline makes a call that waits for an event that never happens.
func deadline(agent kata.AgentServiceService) outcome {
	_, err := agent.GetOOMEvent(within(200*time.Millisecond), &kata.GetOOMEventRequest{})
	return of(err)
}

// manyAtOnce keeps many calls waiting while as many others are answered on the same connection.
func manyAtOnce(agent kata.AgentServiceService, health kata.HealthService) map[string]int {
	ctx, cancel := context.WithCancel(context.Background())
	var waiting, checking sync.WaitGroup
	var lock sync.Mutex
	counts := map[string]int{}
	for i := 0; i < atOnce; i++ {
		waiting.Add(1)
		go func() {
			defer waiting.Done()
			_, err := agent.GetOOMEvent(ctx, &kata.GetOOMEventRequest{})
			lock.Lock()
			defer lock.Unlock()
			if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
				counts["given up"]++
			}
		}()
	}
	for i := 0; i < atOnce; i++ {
		checking.Add(1)
		go func() {
			defer checking.Done()
			check, err := health.Check(within(60*time.Second), &kata.CheckRequest{})
			lock.Lock()
			defer lock.Unlock()
			if err == nil && check.Status == kata.HealthCheckResponse_SERVING {
				counts["answered"]++
			}
		}()
	}
	checking.Wait()
	cancel()
	waiting.Wait()
	return counts
}

// copied runs a container that copies its input, and returns whether the output is identical.
func copied(agent kata.AgentServiceService, container *kata.CreateContainerRequest) bool {
	id := container.ContainerId
	_, err := agent.CreateSandbox(within(time.Minute), &kata.CreateSandboxRequest{SandboxId: "go"})
	must(err)
	_, err = agent.CreateContainer(within(time.Minute), container)
	must(err)
	_, err = agent.StartContainer(within(time.Minute), &kata.StartContainerRequest{ContainerId: id})
	must(err)
	input := make([]byte, inputSize)
	for i := range input {
		input[i] = byte(i * 7 >> 3)
	}
	go func() {
		for at := 0; at < len(input); at += pieceSize {
			piece := &kata.WriteStreamRequest{ContainerId: id, ExecId: id, Data: input[at : at+pieceSize]}
			written, err := agent.WriteStdin(within(time.Minute), piece)
			must(err)
			if written.Len != pieceSize {
				must(fmt.Errorf("%d bytes written of %d", written.Len, pieceSize))
			}
		}
		_, err := agent.CloseStdin(within(time.Minute), &kata.CloseStdinRequest{ContainerId: id, ExecId: id})
		must(err)
	}()
	var output []byte
	for {
		read, err := agent.ReadStdout(within(time.Minute),
			&kata.ReadStreamRequest{ContainerId: id, ExecId: id, Len: pieceSize})
		must(err)
		if len(read.Data) == 0 {
			break
		}
		output = append(output, read.Data...)
	}
	exit, err := agent.WaitProcess(within(time.Minute), &kata.WaitProcessRequest{ContainerId: id, ExecId: id})
	must(err)
	_, err = agent.RemoveContainer(within(time.Minute), &kata.RemoveContainerRequest{ContainerId: id})
	must(err)
	return bytes.Equal(input, output) && exit.Status == 0
}
