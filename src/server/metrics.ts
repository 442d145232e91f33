/** Metrics in Prometheus' text format. deploy/grafana/mixtape.json uses the same names. Knows no request's content. */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { Engine } from "../engine/engine.ts";
import type { NamedModel } from "./catalog.ts";
import type { Observer } from "./context.ts";
import type { ErrorCode } from "./errors.ts";
import type { TokenKind } from "./meter.ts";

const SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

export interface Sources {
  /** The models in memory. */
  readonly models: () => readonly NamedModel[];
  readonly admission: { readonly running: number; readonly queued: number };
  /** Open connections by listener. Default: none are counted. */
  readonly connections?: () => Readonly<Record<string, number>>;
  /** Default 0. */
  readonly logLinesDropped?: () => number;
  /** Seconds since the key file could last be read; 0 while it can. Default 0. */
  readonly keysUnreadableSeconds?: () => number;
}

export class Metrics implements Observer {
  readonly registry = new Registry();
  readonly #requests: Counter;
  readonly #seconds: Histogram;
  readonly #refusals: Counter;
  readonly #queue: Histogram;
  readonly #firstToken: Histogram;
  readonly #nextToken: Histogram;
  readonly #tokens: Counter;
  readonly #steps: Histogram;
  readonly #rows: Histogram;
  readonly #sequences: Histogram;
  readonly #watched = new WeakSet<Engine>();

  /** @param sources read on every scrape */
  constructor({ models, admission, connections = () => ({}), logLinesDropped = () => 0, keysUnreadableSeconds = () => 0 }: Sources) {
    const registers = [this.registry];
    const labelNames = ["model"];
    collectDefaultMetrics({ register: this.registry, prefix: "mixtape_" });
    this.#requests = new Counter({
      name: "mixtape_requests_total",
      help: "Requests by route and status.",
      labelNames: ["route", "status"],
      registers,
    });
    this.#seconds = new Histogram({
      name: "mixtape_request_seconds",
      help: "Time from a request's headers to the end of its response.",
      labelNames: ["route"],
      buckets: SECONDS,
      registers,
    });
    this.#refusals = new Counter({
      name: "mixtape_refusals_total",
      help: "Rejected requests, by error code.",
      labelNames: ["code"],
      registers,
    });
    this.#queue = new Histogram({
      name: "mixtape_queue_seconds",
      help: "Queue time of admitted requests.",
      buckets: SECONDS,
      registers,
    });
    const counted = (name: string, help: string, of: () => number) =>
      new Gauge({
        name,
        help,
        registers,
        collect() {
          this.set(of());
        },
      });
    counted("mixtape_requests_in_progress", "Requests in progress.", () => admission.running);
    counted("mixtape_requests_queued", "Requests waiting in the queue.", () => admission.queued);
    counted("mixtape_keys_unreadable_seconds", "Seconds since the key file could last be read; 0 while it can.", keysUnreadableSeconds);
    new Gauge({
      name: "mixtape_connections",
      help: "Open connections, by listener.",
      labelNames: ["listener"],
      registers,
      collect() {
        for (const [listener, count] of Object.entries(connections())) this.set({ listener }, count);
      },
    });
    new Counter({
      name: "mixtape_log_lines_dropped_total",
      help: "Log lines that could not be written.",
      registers,
      collect() {
        this.reset();
        this.inc(logLinesDropped());
      },
    });
    this.#firstToken = new Histogram({
      name: "mixtape_time_to_first_token_seconds",
      help: "Time from a request to the first text of its answer, queueing included.",
      labelNames,
      buckets: SECONDS,
      registers,
    });
    this.#nextToken = new Histogram({
      name: "mixtape_time_between_tokens_seconds",
      help: "Time between two pieces of an answer's text.",
      labelNames,
      buckets: SECONDS,
      registers,
    });
    this.#tokens = new Counter({
      name: "mixtape_tokens_total",
      help: "Tokens of prompts, of prompts found in the prefix cache, and of answers.",
      labelNames: ["model", "kind"],
      registers,
    });
    this.#steps = new Histogram({
      name: "mixtape_step_seconds",
      help: "Duration of a model step.",
      labelNames,
      buckets: SECONDS,
      registers,
    });
    this.#rows = new Histogram({ name: "mixtape_step_rows", help: "Tokens computed per step.", labelNames, buckets: ROWS, registers });
    this.#sequences = new Histogram({
      name: "mixtape_step_sequences",
      help: "Requests sharing a step.",
      labelNames,
      buckets: ROWS,
      registers,
    });
    const gauge = (name: string, help: string, of: (stats: ReturnType<Engine["stats"]>, engine: Engine) => number) =>
      new Gauge({
        name,
        help,
        labelNames,
        registers,
        collect() {
          this.reset();
          for (const { name: model, engine } of models()) this.set({ model }, of(engine.stats(), engine));
        },
      });
    gauge("mixtape_sequences_running", "Requests that have cache blocks.", (s) => s.running);
    gauge("mixtape_sequences_waiting", "Requests that wait for cache blocks.", (s) => s.waiting);
    gauge("mixtape_kv_blocks", "Blocks of the KV cache, of 32 tokens each.", (s) => s.blocks.count);
    gauge("mixtape_kv_blocks_held", "KV cache blocks that requests hold.", (s) => s.blocks.count - s.blocks.free);
    gauge("mixtape_kv_blocks_remembered", "KV cache blocks that no request holds and the prefix cache keeps.", (s) => s.blocks.remembered);
    gauge("mixtape_preemptions", "Preemptions so far: requests that lost their cache blocks to others.", (s) => s.preemptions);
    new Gauge({
      name: "mixtape_weight_bytes",
      help: "Bytes of weights, by where they are: resident in anonymous memory, or mapped from their file.",
      labelNames: ["model", "where"],
      registers,
      collect() {
        this.reset();
        for (const { name: model, engine } of models()) {
          const { movedBytes, mappedBytes, ownedBytes } = engine.placement();
          this.set({ model, where: "resident" }, movedBytes + ownedBytes);
          this.set({ model, where: "mapped" }, mappedBytes - movedBytes);
        }
      },
    });
    gauge("mixtape_adapters", "Adapters in memory.", (_, engine) => engine.adapters.names.length);
    gauge("mixtape_adapter_bytes", "Bytes of memory that the adapters take, reserved room included.", (_, engine) => engine.adapters.bytes);
    new Gauge({
      name: "mixtape_expert_load",
      help: "How often an expert was chosen, in sampled steps (every sixteenth).",
      labelNames: ["model", "layer", "expert"],
      registers,
      collect() {
        this.reset();
        for (const { name: model, engine } of models())
          engine.stats().expertLoad.forEach((load, layer) => {
            load.forEach((count, expert) => {
              this.set({ model, layer, expert }, count);
            });
          });
      },
    });
  }

  /** Records an engine's steps from now on. */
  watch({ name: model, engine }: NamedModel): void {
    if (this.#watched.has(engine)) return;
    this.#watched.add(engine);
    engine.onStep = ({ seconds, rows, sequences }) => {
      this.#steps.observe({ model }, seconds);
      this.#rows.observe({ model }, rows);
      this.#sequences.observe({ model }, sequences);
    };
  }

  request(route: string, status: number, seconds: number): void {
    this.#requests.inc({ route, status });
    this.#seconds.observe({ route }, seconds);
  }

  refused(code: ErrorCode): void {
    this.#refusals.inc({ code });
  }

  queued(seconds: number): void {
    this.#queue.observe(seconds);
  }

  firstToken(model: string, seconds: number): void {
    this.#firstToken.observe({ model }, seconds);
  }

  nextToken(model: string, seconds: number): void {
    this.#nextToken.observe({ model }, seconds);
  }

  used(model: string, kind: TokenKind, tokens: number): void {
    this.#tokens.inc({ model, kind }, tokens);
  }
}
