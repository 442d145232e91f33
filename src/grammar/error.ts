/** The error of this room: an answer format that cannot be enforced. */

export class GrammarError extends RangeError {
  /** The field that asks for it, like `response_format.json_schema.schema`. */
  readonly param: string;

  constructor(param: string, what: string, options?: ErrorOptions) {
    super(what, options);
    this.name = "GrammarError";
    this.param = param;
  }
}
