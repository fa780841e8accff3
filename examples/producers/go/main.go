// Submit files as jobs to headrace over Kafka, with franz-go and nothing of headrace.
//
//	go run . -topic jobs.text.standard -model minilm-topics -content-type text/plain FILE...
//
// Prints the id of each job once the cluster has it. Environment: BROKERS (localhost:9092), TENANT
// (default), and TENANT_KEY, the tenant's secret where the dispatcher asks for a proof.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"
)

type options struct {
	topic, model, tenant, contentType, mode string
	deadlineSeconds                         float64
}

func main() {
	log.SetFlags(0)
	var o options
	brokers := flag.String("brokers", environment("BROKERS", "localhost:9092"), "host:port,...")
	flag.StringVar(&o.topic, "topic", "", "jobs.<modality>.<lane>")
	flag.StringVar(&o.model, "model", "", "name of the model")
	flag.StringVar(&o.tenant, "tenant", environment("TENANT", "default"), "whose jobs they are")
	flag.StringVar(&o.contentType, "content-type", "application/octet-stream", "of the files")
	flag.StringVar(&o.mode, "mode", "binary", "binary or structured")
	flag.Float64Var(&o.deadlineSeconds, "deadline-s", 3600, "seconds from now")
	flag.Parse()
	if o.topic == "" || o.model == "" || flag.NArg() == 0 {
		log.Fatal("expected -topic, -model and files; see -help")
	}

	// Keyed records go to the partition that murmur2 says, as headrace's own do: the library's default,
	// as are idempotent writes that every in-sync replica has taken.
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(*brokers, ",")...))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, file := range flag.Args() {
		payload, err := os.ReadFile(file)
		if err != nil {
			log.Fatal(err)
		}
		id := uuid.Must(uuid.NewV7()).String()
		// The job is accepted once this returns without an error.
		if err := client.ProduceSync(context.Background(), record(o, id, payload)).FirstErr(); err != nil {
			log.Fatal(err)
		}
		fmt.Println(id)
	}
}

func record(o options, id string, payload []byte) *kgo.Record {
	now := time.Now().UTC()
	deadline := now.Add(time.Duration(o.deadlineSeconds * 1e9)).Truncate(time.Microsecond)
	event := map[string]string{
		"specversion": "1.0",
		"type":        "io.headrace.job.v1",
		"source":      "/examples/go",
		"id":          id,
		"time":        now.Format(time.RFC3339Nano),
		"tenant":      o.tenant,
		"model":       o.model,
		"deadline":    deadline.Format(time.RFC3339Nano),
	}
	record := &kgo.Record{Topic: o.topic, Key: []byte(id), Value: payload}
	add := func(name, text string) {
		record.Headers = append(record.Headers, kgo.RecordHeader{Key: name, Value: []byte(text)})
	}
	if key := os.Getenv("TENANT_KEY"); key != "" {
		add("x-headrace-signature", signature(key, o.tenant, id, deadline, payload, o.model))
	}
	if o.mode == "binary" {
		for name, text := range event {
			add("ce_"+name, text)
		}
		add("content-type", o.contentType)
		return record
	}
	event["datacontenttype"] = o.contentType
	if strings.HasPrefix(o.contentType, "text/") {
		event["data"] = string(payload)
	} else {
		event["data_base64"] = base64.StdEncoding.EncodeToString(payload)
	}
	record.Value, _ = json.Marshal(event) // a map of strings always encodes
	add("content-type", "application/cloudevents+json; charset=utf-8")
	return record
}

// Proof of the tenant: tenant, job id, deadline in microseconds, SHA-256 of the payload, model, a line each.
func signature(key, tenant, id string, deadline time.Time, payload []byte, model string) string {
	digest := sha256.Sum256(payload)
	lines := []string{tenant, id, strconv.FormatInt(deadline.UnixMicro(), 10), hex.EncodeToString(digest[:]), model}
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(strings.Join(lines, "\n")))
	return "v1=" + hex.EncodeToString(mac.Sum(nil))
}

func environment(name, otherwise string) string {
	if found := os.Getenv(name); found != "" {
		return found
	}
	return otherwise
}
