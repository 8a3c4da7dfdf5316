// Ollama's own Go client under the same questions as the others: peer SCRIPT URL OPTIONS prints figures as JSON.
package main

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/ollama/ollama/api"
)

type given struct{ Streams, Tokens, Rate, Requests int }

var messages = []api.Message{{Role: "user", Content: "hi"}}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func cpu() time.Duration {
	var usage syscall.Rusage
	must(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// read reads a stream to its end, calls first at its first chunk, and returns how many chunks there were.
func read(ctx context.Context, client *api.Client, model string, first func()) (count int, err error) {
	err = client.Chat(ctx, &api.ChatRequest{Model: model, Messages: messages}, func(api.ChatResponse) error {
		if count == 0 {
			first()
		}
		count++
		return nil
	})
	return count, err
}

func ask(client *api.Client) {
	whole := false
	request := &api.ChatRequest{Model: "short", Messages: messages, Stream: &whole}
	must(client.Chat(context.Background(), request, func(api.ChatResponse) error { return nil }))
}

func middle(values []time.Duration) time.Duration {
	sort.Slice(values, func(a, b int) bool { return values[a] < values[b] })
	return values[len(values)/2]
}

func streams(client *api.Client, o given) map[string]float64 {
	model := "burst-" + itoa(o.Tokens)
	if o.Rate > 0 {
		model = "paced-" + itoa(o.Tokens) + "-" + itoa(o.Rate)
	}
	firsts := make([]time.Duration, o.Streams)
	counts := make([]int, o.Streams)
	var all sync.WaitGroup
	used, begun := cpu(), time.Now()
	for n := range o.Streams {
		all.Add(1)
		go func() {
			defer all.Done()
			var err error
			counts[n], err = read(context.Background(), client, model, func() { firsts[n] = time.Since(begun) })
			must(err)
		}()
	}
	all.Wait()
	used, wall := cpu()-used, time.Since(begun)
	for _, count := range counts {
		if count < o.Tokens {
			panic("not all chunks came")
		}
	}
	figures := map[string]float64{
		"cpu_us_per_token":   float64(used.Microseconds()) / float64(o.Streams*o.Tokens),
		"wall_s":             wall.Seconds(),
		"first_chunk_p50_ms": middle(firsts).Seconds() * 1e3,
	}
	if o.Rate > 0 {
		figures["times_the_pace"] = wall.Seconds() / (float64(o.Tokens) / float64(o.Rate))
	}
	return figures
}

func storm(client *api.Client, o given) map[string]float64 {
	ctx, stop := context.WithCancel(context.Background())
	firsts := make([]time.Duration, o.Streams)
	var came, ended sync.WaitGroup
	used, begun := cpu(), time.Now()
	for n := range o.Streams {
		came.Add(1)
		ended.Add(1)
		go func() {
			defer ended.Done()
			read(ctx, client, "silent", func() { firsts[n] = time.Since(begun); came.Done() })
		}()
	}
	came.Wait()
	used = cpu() - used
	stop()
	ended.Wait()
	half := middle(firsts)
	return map[string]float64{
		"first_chunk_p50_ms":  half.Seconds() * 1e3,
		"first_chunk_last_ms": firsts[len(firsts)-1].Seconds() * 1e3,
		"cpu_us_per_stream":   float64(used.Microseconds()) / float64(o.Streams),
	}
}

func short(client *api.Client, o given) map[string]float64 {
	used, begun := cpu(), time.Now()
	for range o.Requests {
		ask(client)
	}
	used, wall := cpu()-used, time.Since(begun)
	return map[string]float64{
		"cpu_us_per_request":  float64(used.Microseconds()) / float64(o.Requests),
		"wall_us_per_request": float64(wall.Microseconds()) / float64(o.Requests),
	}
}

func first(client *api.Client, o given) map[string]float64 {
	waits := make([]time.Duration, o.Streams)
	used := cpu()
	for n := range o.Streams {
		begun := time.Now()
		_, err := read(context.Background(), client, "burst-1", func() { waits[n] = time.Since(begun) })
		must(err)
	}
	used = cpu() - used
	return map[string]float64{
		"cpu_us_per_stream":  float64(used.Microseconds()) / float64(o.Streams),
		"first_chunk_p50_us": float64(middle(waits).Nanoseconds()) / 1e3,
	}
}

func itoa(number int) string {
	text, err := json.Marshal(number)
	must(err)
	return string(text)
}

func main() {
	address, err := url.Parse(os.Args[2])
	must(err)
	var o given
	must(json.Unmarshal([]byte(os.Args[3]), &o))
	client := api.NewClient(address, &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4096}})
	ask(client)
	_, err = read(context.Background(), client, "burst-10", func() {})
	must(err)
	scripts := map[string]func(*api.Client, given) map[string]float64{
		"streams.py": streams, "storm.py": storm, "short.py": short, "first.py": first,
	}
	must(json.NewEncoder(os.Stdout).Encode(scripts[os.Args[1]](client, o)))
}
