/**
 * What a call meets before its handler: who asks is found out before a message is read, messages must arrive in time, and what
 * can't be read as a message is the client's error. For every service, those of libraries too.
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
import type { CallReport } from "./report.ts";
import { failureOf } from "./status.ts";

/** In the place of a message that can't be read. An object: reflection's answers repeat the question. */
export const MALFORMED: object = Object.freeze({});

export interface EntranceOptions {
  /** Methods that need a key: those whose path begins so. */
  readonly guarded: string;
  /** Throws ServerError `invalid_api_key`. */
  readonly authenticate: (secret: string | null) => Caller;
  /** Milliseconds for a request to arrive whole. */
  readonly arrivalMs: number;
  /** Told of the calls that are refused here. */
  readonly onEnd: (report: CallReport) => void;
}

export class Entrance {
  readonly #options: EntranceOptions;
  readonly #callers = new WeakMap<Metadata, Caller>();

  constructor(options: EntranceOptions) {
    this.#options = options;
  }

  /** Who sent the metadata, which passed the interceptor. */
  callerOf(metadata: Metadata): Caller {
    const caller = this.#callers.get(metadata);
    if (!caller) throw new Error("internal: a call came by without its caller");
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

/** The service with readers that give MALFORMED where those of the library throw, which would be an error of the server. */
export function lenient(service: ServiceDefinition): ServiceDefinition {
  return Object.fromEntries(
    Object.entries(service).map(([name, method]) => {
      const requestDeserialize = (bytes: Buffer): unknown => {
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

/** For libraries that add their own services: to a server, as they were, but held to what our own methods are held to. */
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
    // A stream of questions whose answers nobody takes: no more are read until they are.
    if (call.pause && call.resume)
      call.on("data", () => {
        if (!call.writableNeedDrain) return;
        call.pause?.();
        call.once("drain", () => call.resume?.());
      });
  }) as UntypedHandleCall;
}

export function malformed(): ServerError {
  return new ServerError("invalid_request", "the message can't be read: it is not what the .proto describes");
}
