// Submit files as jobs to headrace over Kafka, with kafkajs and nothing of headrace.
//
//   node produce.js --topic jobs.text.standard --model minilm-topics --content-type text/plain FILE...
//
// Prints the id of each job once the cluster has it. Environment: BROKERS (localhost:9092), TENANT
// (default), and TENANT_KEY, the tenant's secret where the dispatcher asks for a proof.

import { createHash, createHmac, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Kafka, logLevel, Partitioners } from "kafkajs";

const { values: options, positionals: files } = parseArgs({
  allowPositionals: true,
  options: {
    brokers: { type: "string", default: process.env.BROKERS || "localhost:9092" },
    topic: { type: "string" },
    model: { type: "string" },
    tenant: { type: "string", default: process.env.TENANT || "default" },
    "content-type": { type: "string", default: "application/octet-stream" },
    "deadline-s": { type: "string", default: "3600" },
    mode: { type: "string", default: "binary" },
  },
});
if (!options.topic || !options.model || files.length === 0) {
  console.error("expected --topic, --model and files");
  process.exit(2);
}

const kafka = new Kafka({ brokers: options.brokers.split(","), logLevel: logLevel.ERROR });
// Keyed records go to the partition that murmur2 says, as headrace's own do.
const producer = kafka.producer({
  idempotent: true,
  createPartitioner: Partitioners.DefaultPartitioner,
});
await producer.connect();
for (const file of files) {
  const id = newJobId();
  const message = { key: id, ...record(id, readFileSync(file)) };
  // The job is accepted once this resolves.
  await producer.send({ topic: options.topic, acks: -1, messages: [message] });
  console.log(id);
}
await producer.disconnect();

function record(id, payload) {
  const sent = Date.now();
  const deadline = sent + Math.round(Number(options["deadline-s"]) * 1000);
  const contentType = options["content-type"];
  const event = {
    specversion: "1.0",
    type: "io.headrace.job.v1",
    source: "/examples/node",
    id,
    time: new Date(sent).toISOString(),
    tenant: options.tenant,
    model: options.model,
    deadline: new Date(deadline).toISOString(),
  };
  const headers = {};
  if (process.env.TENANT_KEY) {
    headers["x-headrace-signature"] = signature(process.env.TENANT_KEY, id, deadline, payload);
  }
  if (options.mode === "binary") {
    for (const [name, text] of Object.entries(event)) headers[`ce_${name}`] = text;
    headers["content-type"] = contentType;
    return { headers, value: payload };
  }
  event.datacontenttype = contentType;
  if (contentType.startsWith("text/")) event.data = payload.toString("utf8");
  else event.data_base64 = payload.toString("base64");
  headers["content-type"] = "application/cloudevents+json; charset=utf-8";
  return { headers, value: JSON.stringify(event) };
}

// Proof of the tenant: tenant, job id, deadline in microseconds, SHA-256 of the payload, model, a line each.
function signature(key, id, deadlineMs, payload) {
  const digest = createHash("sha256").update(payload).digest("hex");
  const lines = [options.tenant, id, `${deadlineMs}000`, digest, options.model];
  return "v1=" + createHmac("sha256", key).update(lines.join("\n")).digest("hex");
}

// A UUIDv7: its first 48 bits are the time, which is what makes a job quick to find by its id.
function newJobId() {
  const raw = randomBytes(16);
  raw.writeUIntBE(Date.now(), 0, 6);
  raw[6] = (raw[6] & 0x0f) | 0x70;
  raw[8] = (raw[8] & 0x3f) | 0x80;
  return raw.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
