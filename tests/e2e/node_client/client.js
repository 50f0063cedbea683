// A client generated from the protos: unary calls, an error with details, a server stream, 64-bit values.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Fleet } from "./gen/fleet/v1/fleet_pb.js";
import { Queue } from "./gen/fleet/v1/queue_pb.js";
import { JobType } from "./gen/fleet/v1/types_pb.js";

const transport = createGrpcTransport({ baseUrl: process.argv[2] });
const fleet = createClient(Fleet, transport);
const queue = createClient(Queue, transport);
const found = {};

found.health = (await fleet.getHealth({})).status;

const seed = 2n ** 63n + 1n;
const made = await fleet.generate({ prompt: "forest", width: 64, height: 64, steps: 2, seed });
found.png = Buffer.from(made.image.data.subarray(1, 4)).toString();
found.contentType = made.image.contentType;
found.seedExact = made.seed === seed;

try {
  await fleet.generate({ prompt: "forest", width: 65 });
} catch (error) {
  const refusal = ConnectError.from(error);
  found.refused = Code[refusal.code];
  found.message = refusal.rawMessage;
}

const payload = { prompt: "sea", width: 64, height: 64, steps: 3 };
const { receipt } = await queue.createJob({ jobType: JobType.IMAGE_GEN, payload });
found.events = [];
for await (const event of queue.watchJob({ jobId: receipt.jobId })) {
  found.events.push(event.data.case);
  if (event.data.case === "jobComplete") found.outputs = event.data.value.result.outputs.length;
}
console.log(JSON.stringify(found));
