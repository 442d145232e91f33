/**
 * What a call passes before its handler: authentication before a message is read, a time limit for the message to arrive, and an
 * error of the client for messages that can't be decoded. Applies to every service, those of libraries too. Knows no method.
 */
import {
  type Metadata,
  ServerInterceptingCall,
  type ServerInterceptor,
  ServerListenerBuilder,
  type ServiceDefinition,
  type UntypedHandleCall,
  type UntypedServiceImplementation,
} from "@grpc/grpc-js";
import type { Caller } from "../access/gate.ts";
import { bearerToken } from "../access/gate.ts";
import { ServerError } from "../errors.ts";
import { requestId } from "../logs.ts";
import { malformed } from "./messages.ts";
import type { CallReport } from "./report.ts";
import { failureOf } from "./status.ts";

/** Stands for a message that can't be decoded. An object, since reflection's responses repeat the request. */
const MALFORMED: object = Object.freeze({});

export interface EntranceOptions {
  /** Path prefix of methods that need a key. */
  readonly guarded: string;
  /** Throws ServerError `invalid_api_key`. */
  readonly authenticate: (secret: string | null) => Caller;
  /** Milliseconds for a complete request to arrive. */
  readonly arrivalMs: number;
  /** Called for calls that are rejected here. */
  readonly onEnd: (report: CallReport) => void;
}

export class Entrance {
  readonly #options: EntranceOptions;
  readonly #callers = new WeakMap<Metadata, Caller>();

  constructor(options: EntranceOptions) {
    this.#options = options;
  }

  /** The caller that the interceptor found for this metadata. */
  callerOf(metadata: Metadata): Caller {
    const caller = this.#callers.get(metadata);
    if (!caller) throw new Error("internal: a call reached its handler without a caller");
    return caller;
  }

  readonly interceptor: ServerInterceptor = (method, call) => {
    const { guarded, authenticate, arrivalMs, onEnd } = this.#options;
    let late: NodeJS.Timeout | undefined;
    const start = performance.now();
    const refuse = (error: unknown, metadata: Metadata) => {
      const { failure, known } = failureOf(error);
      const seconds = (performance.now() - start) / 1000;
      const id = requestId(metadata.get("x-request-id")[0]);
      failure.metadata.set("x-request-id", id);
      onEnd({ requestId: id, path: method.path, callerId: "", outcome: known.code, seconds, error });
      call.sendStatus(failure);
    };
    const listener = new ServerListenerBuilder()
      .withOnReceiveMetadata((metadata, next) => {
        try {
          const [host] = metadata.get("host");
          if (host !== undefined && host.toString() !== call.getHost())
            throw new ServerError("invalid_request", "the request's :authority and its header host name different hosts");
          const [header] = metadata.get("authorization");
          if (method.path.startsWith(guarded)) this.#callers.set(metadata, authenticate(bearerToken(header?.toString())));
        } catch (error) {
          refuse(error, metadata);
          return;
        }
        const tooLate = () => refuse(new ServerError("timeout", `the request did not arrive within ${arrivalMs / 1000} s`), metadata);
        if (!method.requestStream) late = setTimeout(tooLate, arrivalMs);
        next(metadata);
      })
      .withOnReceiveHalfClose((next) => {
        clearTimeout(late);
        next();
      })
      .withOnCancel(() => clearTimeout(late))
      .build();
    return new ServerInterceptingCall(call, { start: (next) => next(listener) });
  };
}

/** The service with requests left as bytes, for the reader. */
export function undecoded(service: ServiceDefinition): ServiceDefinition {
  return Object.fromEntries(
    Object.entries(service).map(([name, method]) => [name, { ...method, requestDeserialize: (bytes: Buffer) => bytes }]),
  );
}

/** The largest message of libraries' services: what these decode blocks the event loop. */
const MOST_LIBRARY_BYTES = 16_384;

/**
 * The service with decoders that return MALFORMED for messages that are too large and where the library's throw, which clients would
 * see as a server error.
 */
function lenient(service: ServiceDefinition): ServiceDefinition {
  return Object.fromEntries(
    Object.entries(service).map(([name, method]) => {
      const requestDeserialize = (bytes: Buffer): unknown => {
        if (bytes.length > MOST_LIBRARY_BYTES) return MALFORMED;
        try {
          return method.requestDeserialize(bytes);
        } catch {
          return MALFORMED;
        }
      };
      return [name, { ...method, requestDeserialize }];
    }),
  );
}

interface AnyCall extends NodeJS.EventEmitter {
  readonly request?: unknown;
  readonly writableNeedDrain?: boolean;
  pause?(): void;
  resume?(): void;
}

/** A server for libraries that add their own services: holds them to the same checks as our methods. */
export function strict(server: {
  addService(service: ServiceDefinition, implementation: UntypedServiceImplementation): void;
}): typeof server {
  return {
    addService: (service, implementation) => {
      const held = Object.entries(implementation).map(([name, handle]) => [name, hold(handle as (...args: unknown[]) => void)]);
      server.addService(lenient(service), Object.fromEntries(held) as UntypedServiceImplementation);
    },
  };
}

function hold(handle: (...args: unknown[]) => void): UntypedHandleCall {
  return ((call: AnyCall, done?: (error: unknown) => void) => {
    if (call.request === MALFORMED) {
      const { failure } = failureOf(malformed());
      if (done) done(failure);
      else call.emit("error", failure);
      return;
    }
    handle(call, done);
    // A stream of requests whose responses nobody reads: pause reading until they are read.
    if (call.pause && call.resume)
      call.on("data", () => {
        if (!call.writableNeedDrain) return;
        call.pause?.();
        call.once("drain", () => call.resume?.());
      });
  }) as UntypedHandleCall;
}
