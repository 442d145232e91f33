/** The server's certificate, reloaded when its files change, so that renewing it needs no restart. Knows no protocol. */
import { readFileSync, unwatchFile, watchFile } from "node:fs";
import { createSecureContext } from "node:tls";
import { ServerConfigError } from "./config.ts";
import type { Logger } from "./logs.ts";

export interface KeyPair {
  /** PEM, the whole chain. */
  readonly cert: Buffer;
  readonly key: Buffer;
}

/** How often the files are checked for changes. */
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

  /** Called with each new pair. */
  set onChange(listener: (pair: KeyPair) => void) {
    this.#onChange = listener;
  }

  /** Reloads the files; keeps the current pair when they are broken or only one of them has been replaced yet. */
  readonly reload = (): void => {
    try {
      this.#current = read(this.#certFile, this.#keyFile);
      this.#onChange(this.#current);
      this.#log.info("certificate reloaded");
    } catch (err) {
      this.#log.error({ err }, "cannot reload the certificate; the previous one stays in use");
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
