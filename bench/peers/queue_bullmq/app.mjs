// BullMQ: `work` runs a worker with concurrency 100, `produce` takes orders (see ../queue_python/_common.py).
import fs from 'node:fs';
import readline from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';

const TEXT = 'a lighthouse at dusk, '.repeat(9);
const url = process.env.BENCH_STORE_URL;
const now = () => process.hrtime.bigint();
const say = (message) => process.stdout.write(JSON.stringify(message) + '\n');

// BigInt nanoseconds are beyond what JSON numbers hold exactly; a double is good to 2 microseconds for months of uptime.
const plain = (ns) => Number(ns);

if (process.argv[2] === 'work') {
  const marks = fs.openSync(process.env.BENCH_MARKS, 'a', 0o600);
  const worker = new Worker('bench', async (job) => {
    const mark = Buffer.alloc(16);
    mark.writeBigUInt64LE(BigInt(job.data.number), 0);
    mark.writeBigUInt64LE(now(), 8);
    fs.writeSync(marks, mark);
  }, { connection: new Redis(url, { maxRetriesPerRequest: null }), concurrency: 100 });
  await worker.waitUntilReady();
} else {
  const queue = new Queue('bench', { connection: new Redis(url, { maxRetriesPerRequest: null }),
    // As its documentation advises for production: ended jobs are not kept for ever.
    defaultJobOptions: { removeOnComplete: true } });
  await queue.waitUntilReady();
  const one = (number) => queue.add('note', { number, text: TEXT });
  const many = (first, last) => {
    const jobs = [];
    for (let number = first; number < last; number += 1) {
      jobs.push({ name: 'note', data: { number, text: TEXT } });
    }
    return queue.addBulk(jobs);
  };
  say({});
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { kind, first, count, size, callers, gap } = JSON.parse(line);
    const starts = [];
    const start = now();
    if (kind === 'spaced') {
      for (let number = first; number < first + count; number += 1) {
        await sleep(gap * 1000);
        starts.push(plain(now()));
        await one(number);
      }
    } else {
      let next = first;
      const caller = async () => {
        while (next < first + count) {
          const from = next;
          next = Math.min(from + size, first + count);
          await (kind === 'single' ? one(from) : many(from, next));
        }
      };
      await Promise.all(Array.from({ length: callers }, caller));
    }
    say({ start: plain(start), end: plain(now()), starts });
  }
  await queue.close();
  process.exit(0);
}
