/** Keeps the API key: for this tab, or in this browser if the user says so. Nothing else of the page reads it. */

const NAME = "mixtape.key";

export class Vault {
  #key: string;

  constructor() {
    this.#key = sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
  }

  /** Empty where there is none. */
  get key(): string {
    return this.#key;
  }

  get kept(): boolean {
    return localStorage.getItem(NAME) !== null;
  }

  /** @param keep whether it stays after the tab is closed */
  set(key: string, keep: boolean): void {
    this.#key = key.trim();
    sessionStorage.removeItem(NAME);
    localStorage.removeItem(NAME);
    if (this.#key !== "") (keep ? localStorage : sessionStorage).setItem(NAME, this.#key);
  }
}
