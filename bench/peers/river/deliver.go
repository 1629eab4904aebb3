package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/riverqueue/river"
)

// Message is what the job's arguments hold, and, as JSON, what the receiver gets.
type Message struct {
	ID        int64     `json:"id"`
	Recipient string    `json:"recipient"`
	Content   string    `json:"content"`
	CreatedAt time.Time `json:"created_at"`
}

// Kind is the name that River knows these jobs by.
func (Message) Kind() string { return "deliver" }

// deliverWorker posts one message, signed as Standard Webhooks says.
type deliverWorker struct {
	river.WorkerDefaults[Message]
	client *http.Client
	url    string
	secret []byte
}

func newDeliverWorker(connections int) (*deliverWorker, error) {
	url, err := setting("RECEIVER_URL")
	if err != nil {
		return nil, err
	}
	text, err := setting("WEBHOOK_SECRET")
	if err != nil {
		return nil, err
	}
	secret, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(text, "whsec_"))
	if err != nil {
		return nil, fmt.Errorf("WEBHOOK_SECRET must be whsec_ and base64: %w", err)
	}
	// As many idle connections as workers: with Go's default of two a host, most requests would open a new one.
	transport := &http.Transport{
		MaxIdleConnsPerHost: connections,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
	}
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	return &deliverWorker{client: client, url: url, secret: secret}, nil
}

// Work makes one attempt. An error makes River try again later.
func (w *deliverWorker) Work(ctx context.Context, job *river.Job[Message]) error {
	body, err := json.Marshal(job.Args)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	id, timestamp := strconv.FormatInt(job.Args.ID, 10), strconv.FormatInt(time.Now().Unix(), 10)
	request.Header.Set("content-type", "application/json")
	request.Header.Set("webhook-id", id)
	request.Header.Set("webhook-timestamp", timestamp)
	request.Header.Set("webhook-signature", w.sign(id, timestamp, body))
	answer, err := w.client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	// Only a connection whose answer has been read can be used again.
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return err
	}
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return fmt.Errorf("the receiver answered %s", answer.Status)
	}
	return nil
}

func (w *deliverWorker) sign(id, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, w.secret)
	mac.Write([]byte(id + "." + timestamp + "."))
	mac.Write(body)
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}
