/** Stores the API key: for this tab, or in this browser if the user asks for it. No other part of the page reads that storage. */

const NAME = "mixtape.key";

export class Vault {
  #key: string;

  constructor() {
    this.#key = sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
  }

  /** Empty when there is none. */
  get key(): string {
    return this.#key;
  }

  get kept(): boolean {
    return localStorage.getItem(NAME) !== null;
  }

  /** @param keep whether to keep the key after the tab is closed; an empty key removes the stored one */
  set(key: string, keep: boolean): void {
    this.#key = key.trim();
    sessionStorage.removeItem(NAME);
    localStorage.removeItem(NAME);
    if (this.#key !== "") (keep ? localStorage : sessionStorage).setItem(NAME, this.#key);
  }
}
