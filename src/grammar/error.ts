/** A form that an answer was asked to have and that cannot be enforced. */

export class GrammarError extends RangeError {
  /** The field that asks for it, like `response_format.json_schema.schema`. */
  readonly param: string;

  constructor(param: string, what: string, options?: ErrorOptions) {
    super(what, options);
    this.name = "GrammarError";
    this.param = param;
  }
}
