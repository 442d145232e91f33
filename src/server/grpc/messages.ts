/**
 * Decodes messages of mixtape.proto and turns them into checked requests. What a message holds is counted from its bytes, so that
 * nothing is built of one that has too much of anything. Knows no call.
 */
import { fileURLToPath } from "node:url";
import { loadSync, type MethodDefinition, type PackageDefinition, type ServiceDefinition } from "@grpc/proto-loader";
import { ServerError } from "../errors.ts";
import { MOST_FIELDS, MOST_VALUES } from "../http/body.ts";
import {
  type ChatRequest,
  type ClassifyRequest,
  type DetokenizeRequest,
  type EmbedRequest,
  type GenerateRequest,
  type Named,
  type RouteRequest,
  readChat,
  readClassify,
  readDetokenize,
  readEmbed,
  readGenerate,
  readNamed,
  readRoute,
  readTokenize,
  type TokenizeRequest,
} from "./requests.ts";

/** The path is the same from src/ and from dist/. */
export const PROTO = fileURLToPath(new URL("../../../proto/mixtape/v1/mixtape.proto", import.meta.url));
export const SERVICE = "mixtape.v1.Mixtape";
export const LOADING = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true } as const;

/** The checked request of a method. Throws ServerError `invalid_request`, PromptError or GrammarError, naming the HTTP body's field. */
export function readMessage(method: string, bytes: Buffer, maxJsonDepth: number): Named {
  const message = decode(method, bytes);
  switch (method) {
    case "Generate":
      return readGenerate(message as GenerateRequest, maxJsonDepth);
    case "Chat":
      return readChat(message as ChatRequest, maxJsonDepth);
    case "Tokenize":
      return readTokenize(message as TokenizeRequest);
    case "Detokenize":
      return readDetokenize(message as DetokenizeRequest);
    case "Embed":
      return readEmbed(message as EmbedRequest);
    case "Classify":
      return readClassify(message as ClassifyRequest);
    case "Route":
      return readRoute(message as RouteRequest);
    case "GetModel":
      return readNamed(message);
    case "ListModels":
      return message;
    default:
      throw new Error(`internal: nothing reads messages of ${method}`);
  }
}

let loaded: PackageDefinition | null = null;

function decode(method: string, bytes: Buffer): Named {
  loaded ??= loadSync(PROTO, LOADING);
  const { requestType, requestDeserialize } = (loaded[SERVICE] as ServiceDefinition)[method] as MethodDefinition<object, object>;
  new Counter(loaded).count(bytes, (requestType.type as Descriptor).name);
  try {
    return requestDeserialize(bytes) as Named;
  } catch {
    throw malformed();
  }
}

export function malformed(): ServerError {
  return new ServerError("invalid_request", "the message can't be decoded: it does not match the .proto");
}

/** The part of a message's descriptor that counting needs. */
interface Descriptor {
  readonly name: string;
  readonly field: readonly Field[];
}

interface Field {
  readonly number: number;
  readonly label: string;
  readonly type: string;
  /** Of a field that holds a message. */
  readonly typeName: string;
}

/** Wire types (https://protobuf.dev/programming-guides/encoding). */
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5];

class Counter {
  readonly #definition: PackageDefinition;
  #bytes: Buffer = Buffer.alloc(0);
  #at = 0;
  #values = 0;
  #messages = 0;
  /** Fields by number of each type of message. */
  readonly #types = new Map<string, ReadonlyMap<number, Field>>();

  constructor(definition: PackageDefinition) {
    this.#definition = definition;
  }

  /** Throws ServerError for a message that is malformed or holds too much. */
  count(bytes: Buffer, type: string): void {
    this.#bytes = bytes;
    this.#message(type, bytes.length);
  }

  #message(type: string, end: number): void {
    const fields = this.#fields(type);
    while (this.#at < end) {
      const key = this.#varint();
      const field = fields.get(Math.floor(key / 8));
      this.#add(1);
      switch (key % 8) {
        case VARINT:
          this.#varint();
          break;
        case FIXED64:
          this.#at += 8;
          break;
        case FIXED32:
          this.#at += 4;
          break;
        case BYTES: {
          const length = this.#varint();
          const to = this.#at + length;
          if (to > end) throw malformed();
          if (field?.type === "TYPE_MESSAGE") {
            if (++this.#messages > MOST_FIELDS) throw tooMany(MOST_FIELDS);
            this.#message(field.typeName, to);
          } else if (field?.label === "LABEL_REPEATED" && field.type !== "TYPE_STRING" && field.type !== "TYPE_BYTES") this.#packed(to);
          this.#at = to;
          break;
        }
        default:
          throw malformed(); // groups, which proto3 does not have
      }
    }
    if (this.#at > end) throw malformed();
  }

  /** A list of numbers: each of them ends with a byte below 128. */
  #packed(to: number): void {
    for (let i = this.#at; i < to; i++) if (this.#bytes[i] < 128) this.#add(1);
  }

  #add(count: number): void {
    this.#values += count;
    if (this.#values > MOST_VALUES) throw tooMany(MOST_VALUES);
  }

  #varint(): number {
    let value = 0;
    for (let shift = 1, i = 0; i < 10; i++, shift *= 128) {
      const byte = this.#bytes[this.#at++];
      if (byte === undefined) throw malformed();
      value += (byte % 128) * shift;
      if (byte < 128) return value;
    }
    throw malformed();
  }

  /** Empty for a type that is nested in another: none of those holds lists. */
  #fields(type: string): ReadonlyMap<number, Field> {
    const known = this.#types.get(type);
    if (known) return known;
    const found = this.#definition[`mixtape.v1.${type}`];
    const descriptor = found && "type" in found ? (found.type as Descriptor) : null;
    const fields = new Map(descriptor?.field.map((field) => [field.number, field]));
    this.#types.set(type, fields);
    return fields;
  }
}

function tooMany(most: number): ServerError {
  return new ServerError("invalid_request", `the message holds more than ${most} values, which is the most`);
}
