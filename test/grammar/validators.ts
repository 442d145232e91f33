/** Two independent validators of JSON Schema, for what grammars write. Formats are annotations, as the standard has them. */
import { type Schema as CfSchema, type OutputUnit, type SchemaDraft, Validator } from "@cfworker/json-schema";
import Ajv from "ajv";
import { Ajv2019 } from "ajv/dist/2019.js";
import { Ajv2020 } from "ajv/dist/2020.js";

export type Draft = "4" | "7" | "2019-09" | "2020-12";
export type Check = (value: unknown) => string | null;

/** Says what is wrong with a value; null: nothing. Null instead of a check: the validator can't read the schema. */
export function validators(schema: unknown, draft: Draft): { readonly name: string; readonly check: Check | null }[] {
  return [
    { name: "ajv", check: attempt(() => ajv(schema, draft)) },
    { name: "cfworker", check: attempt(() => cfworker(schema, draft)) },
  ];
}

function attempt(make: () => Check): Check | null {
  try {
    const check = make();
    check({});
    check([[]]);
    return check;
  } catch {
    return null;
  }
}

function ajv(schema: unknown, draft: Draft): Check {
  const options = { strict: false, validateFormats: false, logger: false, ownProperties: true } as const;
  const Class = { "4": Ajv, "7": Ajv, "2019-09": Ajv2019, "2020-12": Ajv2020 }[draft] as unknown as typeof Ajv2020;
  const made = new Class(draft === "4" ? { ...options, validateSchema: false } : options);
  // Where draft-04 does not differ from draft-07, that is how it is read.
  if (draft === "4" && /"(id|exclusiveM(in|ax)imum)":/.test(JSON.stringify(schema))) throw new Error("draft-04 only");
  const { $schema: _draft, ...rest } = schema as { $schema?: unknown };
  const valid = made.compile(
    draft === "7" || draft === "4" ? (typeof schema === "object" ? rest : (schema as boolean)) : (schema as object | boolean),
  );
  return (value) => (valid(value) ? null : made.errorsText(valid.errors));
}

function cfworker(schema: unknown, draft: Draft): Check {
  const validator = new Validator(schema as CfSchema | boolean, draft as SchemaDraft);
  return (value) => {
    const { valid, errors } = validator.validate(value);
    return valid ? null : errors.map((unit: OutputUnit) => `${unit.keywordLocation}: ${unit.error}`).join("; ");
  };
}
