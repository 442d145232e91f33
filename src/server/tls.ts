/** The certificate of the server, read again when its files change, so that a renewed one needs no restart. */
import { readFileSync, unwatchFile, watchFile } from "node:fs";
import { createSecureContext } from "node:tls";
import { ServerConfigError } from "./config.ts";
import type { Logger } from "./logs.ts";

export interface KeyPair {
  /** PEM, the whole chain. */
  readonly cert: Buffer;
  readonly key: Buffer;
}

/** How often the files are looked at. */
const RELOAD_MS = 60_000;

export class Certificate {
  readonly #certFile: string;
  readonly #keyFile: string;
  readonly #log: Logger;
  #current: KeyPair;
  #onChange: (pair: KeyPair) => void = () => {};

  /** Throws ServerConfigError when the files can't be read or don't belong together. */
  constructor({ cert, key }: { readonly cert: string; readonly key: string }, log: Logger) {
    this.#certFile = cert;
    this.#keyFile = key;
    this.#log = log;
    this.#current = read(cert, key);
    for (const file of [cert, key]) watchFile(file, { interval: RELOAD_MS, persistent: false }, this.reload);
  }

  get current(): KeyPair {
    return this.#current;
  }

  /** Told of each new pair. */
  set onChange(listener: (pair: KeyPair) => void) {
    this.#onChange = listener;
  }

  /** Reads the files again; keeps the pair that is there when they are broken, or only half of them was replaced yet. */
  readonly reload = (): void => {
    try {
      this.#current = read(this.#certFile, this.#keyFile);
      this.#onChange(this.#current);
      this.#log.info("certificate read again");
    } catch (err) {
      this.#log.error({ err }, "the certificate could not be read again; the one from before stays in use");
    }
  };

  close(): void {
    for (const file of [this.#certFile, this.#keyFile]) unwatchFile(file, this.reload);
  }
}

function read(certFile: string, keyFile: string): KeyPair {
  const file = (path: string): Buffer => {
    try {
      return readFileSync(path);
    } catch (cause) {
      throw new ServerConfigError(`${path}: can't be read (${(cause as Error).message})`, { cause });
    }
  };
  const pair = { cert: file(certFile), key: file(keyFile) };
  try {
    createSecureContext(pair);
  } catch (cause) {
    throw new ServerConfigError(`${certFile} and ${keyFile} are not a certificate and its key (${(cause as Error).message})`, { cause });
  }
  return pair;
}
