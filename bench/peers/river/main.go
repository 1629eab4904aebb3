// The benchmark's job on River: `river migrate`, `river insert N`, `river work`.
//
// DATABASE_URL names the database. `work` also reads RECEIVER_URL, WEBHOOK_SECRET and the three settings
// RIVER_MAX_WORKERS, RIVER_FETCH_COOLDOWN_MS and RIVER_FETCH_POLL_INTERVAL_MS; `../run` sets them all.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

// insertBatch is how many jobs one COPY takes; River's own benchmark takes as many.
const insertBatch = 5_000

// stopPatience bounds an orderly stop. The database is thrown away after it.
const stopPatience = 3 * time.Second

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "river: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	url, err := setting("DATABASE_URL")
	if err != nil {
		return err
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return fmt.Errorf("DATABASE_URL can't be used: %w", err)
	}
	defer pool.Close()
	switch {
	case len(args) == 1 && args[0] == "migrate":
		return migrate(ctx, pool)
	case len(args) == 2 && args[0] == "insert":
		return insert(ctx, pool, args[1])
	case len(args) == 1 && args[0] == "work":
		return work(ctx, pool)
	}
	return errors.New("say `river migrate`, `river insert N` or `river work`")
}

func migrate(ctx context.Context, pool *pgxpool.Pool) error {
	migrator, err := rivermigrate.New(riverpgxv5.New(pool), nil)
	if err != nil {
		return err
	}
	_, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil)
	return err
}

func insert(ctx context.Context, pool *pgxpool.Pool, count string) error {
	total, err := strconv.Atoi(count)
	if err != nil {
		return fmt.Errorf("`river insert` takes a number of jobs, not %q", count)
	}
	// A client without queues only inserts.
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{})
	if err != nil {
		return err
	}
	content := strings.Repeat("x", 300)
	for first := 1; first <= total; first += insertBatch {
		batch := make([]river.InsertManyParams, 0, insertBatch)
		now := time.Now().UTC()
		for id := first; id < first+insertBatch && id <= total; id++ {
			args := Message{ID: int64(id), Recipient: "+905551111111", Content: content, CreatedAt: now}
			batch = append(batch, river.InsertManyParams{Args: args})
		}
		if _, err := client.InsertManyFast(ctx, batch); err != nil {
			return fmt.Errorf("jobs from %d on can't be inserted: %w", first, err)
		}
	}
	return nil
}

func work(ctx context.Context, pool *pgxpool.Pool) error {
	config, maxWorkers, err := config()
	if err != nil {
		return err
	}
	deliver, err := newDeliverWorker(maxWorkers)
	if err != nil {
		return err
	}
	river.AddWorker(config.Workers, deliver)
	client, err := river.NewClient(riverpgxv5.New(pool), config)
	if err != nil {
		return err
	}
	// The signal's context must not end running jobs: Stop lets them finish.
	if err := client.Start(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	<-ctx.Done()
	return stop(client)
}

func stop(client *river.Client[pgx.Tx]) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopPatience)
	defer cancel()
	return client.Stop(ctx)
}

func config() (*river.Config, int, error) {
	maxWorkers, errWorkers := numberSetting("RIVER_MAX_WORKERS")
	cooldown, errCooldown := numberSetting("RIVER_FETCH_COOLDOWN_MS")
	poll, errPoll := numberSetting("RIVER_FETCH_POLL_INTERVAL_MS")
	if err := errors.Join(errWorkers, errCooldown, errPoll); err != nil {
		return nil, 0, err
	}
	return &river.Config{
		FetchCooldown:     time.Duration(cooldown) * time.Millisecond,
		FetchPollInterval: time.Duration(poll) * time.Millisecond,
		Logger:            slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: maxWorkers}},
		Workers:           river.NewWorkers(),
	}, maxWorkers, nil
}

func setting(name string) (string, error) {
	value := os.Getenv(name)
	if value == "" {
		return "", fmt.Errorf("%s is not set: start this through bench/peers/run", name)
	}
	return value, nil
}

func numberSetting(name string) (int, error) {
	value, err := setting(name)
	if err != nil {
		return 0, err
	}
	number, err := strconv.Atoi(value)
	if err != nil {
		return 0, fmt.Errorf("%s must be a whole number, not %q", name, value)
	}
	return number, nil
}
