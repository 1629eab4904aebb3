// The benchmark's job on Graphile Worker: `peer.js migrate`, `peer.js insert N`, `peer.js work`.
//
// DATABASE_URL names the database. `work` also reads RECEIVER_URL, WEBHOOK_SECRET and the settings
// GRAPHILE_CONCURRENT_JOBS, GRAPHILE_LOCAL_QUEUE_SIZE and GRAPHILE_BATCH_DELAY_MS; `../run` sets them all.
import { createHmac } from "node:crypto";

import { Logger, makeWorkerUtils, run, WorkerPreset } from "graphile-worker";
import { Pool } from "undici";

// How many jobs one call of addJobs takes.
const INSERT_BATCH = 5_000;

// Worker logs a line for each job at the level info. All three systems of the benchmark log warnings only.
const logger = new Logger(() => (level, message) => {
  if (level === "error" || level === "warning") console.error(`${level}: ${message}`);
});

function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: start this through bench/peers/run`);
  return value;
}

function numberSetting(name) {
  const number = Number(setting(name));
  if (!Number.isInteger(number)) throw new Error(`${name} must be a whole number, not "${process.env[name]}"`);
  return number;
}

async function withUtils(use) {
  const utils = await makeWorkerUtils({ connectionString: setting("DATABASE_URL"), logger });
  try {
    await use(utils);
  } finally {
    await utils.release();
  }
}

async function insert(total) {
  if (!Number.isInteger(total)) throw new Error("`peer.js insert` takes a number of jobs");
  const content = "x".repeat(300);
  await withUtils(async (utils) => {
    for (let first = 1; first <= total; first += INSERT_BATCH) {
      const size = Math.min(INSERT_BATCH, total - first + 1);
      const created_at = new Date().toISOString();
      const jobs = Array.from({ length: size }, (_, i) => ({
        identifier: "deliver",
        payload: { id: first + i, recipient: "+905551111111", content, created_at },
      }));
      await utils.addJobs(jobs);
    }
  });
}

// A task that posts one message, signed as Standard Webhooks says. An error makes Worker try again later.
function deliverTask(connections) {
  const url = new URL(setting("RECEIVER_URL"));
  const secret = Buffer.from(setting("WEBHOOK_SECRET").replace(/^whsec_/, ""), "base64");
  const client = new Pool(url.origin, { connections });
  return async (message) => {
    const body = JSON.stringify({
      id: message.id,
      recipient: message.recipient,
      content: message.content,
      created_at: message.created_at,
    });
    const id = String(message.id);
    const timestamp = String(Math.floor(Date.now() / 1000));
    const signature = createHmac("sha256", secret).update(`${id}.${timestamp}.${body}`).digest("base64");
    const answer = await client.request({
      method: "POST",
      path: url.pathname,
      headers: {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": `v1,${signature}`,
      },
      body,
    });
    // Read to its end: only then is the attempt over and the connection free.
    await answer.body.dump();
    if (answer.statusCode < 200 || answer.statusCode > 299) {
      throw new Error(`the receiver answered ${answer.statusCode}`);
    }
  };
}

async function work() {
  const concurrentJobs = numberSetting("GRAPHILE_CONCURRENT_JOBS");
  const delay = numberSetting("GRAPHILE_BATCH_DELAY_MS");
  const runner = await run({
    logger,
    preset: {
      extends: [WorkerPreset],
      worker: {
        connectionString: setting("DATABASE_URL"),
        concurrentJobs,
        maxPoolSize: Math.max(10, concurrentJobs + 2),
        localQueue: { size: numberSetting("GRAPHILE_LOCAL_QUEUE_SIZE") },
        completeJobBatchDelay: delay,
        failJobBatchDelay: delay,
      },
    },
    taskList: { deliver: deliverTask(concurrentJobs) },
  });
  // Worker itself ends in order on SIGTERM.
  await runner.promise;
}

const [verb, count] = process.argv.slice(2);
if (verb === "migrate") await withUtils((utils) => utils.migrate());
else if (verb === "insert") await insert(Number(count));
else if (verb === "work") await work();
else throw new Error("say `peer.js migrate`, `peer.js insert N` or `peer.js work`");
