/** Formats of strings, as patterns whose matches are always valid. They allow less than the formats do. Knows no schema. */

/** One way to write a format. */
export interface Form {
  readonly pattern: string;
  /** Patterns that libraries write beside the format and that this one implies, so that they need no check. */
  readonly implies: readonly string[];
}

const DATE = "(19|20)\\d\\d-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))";
const CLOCK = "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d";
const ZONE = "(Z|[+-](0\\d|1[0-4]):[0-5]\\d)";
const LABEL = "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?";
const BYTE = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";

/** What zod 4 writes. */
const ZOD_DATE =
  "(?:(?:\\d\\d[2468][048]|\\d\\d[13579][26]|\\d\\d0[48]|[02468][048]00|[13579][26]00)-02-29|\\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|(?:02)-(?:0[1-9]|1\\d|2[0-8])))";
const ZOD_UTC = `^${ZOD_DATE}T(?:(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d+)?(?:Z))$`;
const ZOD_ZONED = `^${ZOD_DATE}T(?:(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d+)?(?:Z|([+-](?:[01]\\d|2[0-3]):[0-5]\\d)))$`;
const ZOD_EMAIL = "^(?:[A-Za-z0-9_'+\\-]+\\.)*[A-Za-z0-9_'+\\-]*[A-Za-z0-9_+-]@(?:[A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$";
const ZOD_HOSTNAME =
  "^(?=.{1,253}\\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\\.?$";
const ZOD_DURATION = "^P(?:(\\d+W)|(?!.*W)(?=\\d|T\\d)(\\d+Y)?(\\d+M)?(\\d+D)?(T(?=\\d)(\\d+H)?(\\d+M)?(\\d+([.,]\\d+)?S)?)?)$";
const ZOD_UUID =
  "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}|00000000-0000-0000-0000-000000000000|ffffffff-ffff-ffff-ffff-ffffffffffff)$";
const ZOD_IPV4 = "^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])$";
const ZOD_IPV6 =
  "^(([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,7}:|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,5}(:[0-9a-fA-F]{1,4}){1,2}|([0-9a-fA-F]{1,4}:){1,4}(:[0-9a-fA-F]{1,4}){1,3}|([0-9a-fA-F]{1,4}:){1,3}(:[0-9a-fA-F]{1,4}){1,4}|([0-9a-fA-F]{1,4}:){1,2}(:[0-9a-fA-F]{1,4}){1,5}|[0-9a-fA-F]{1,4}:((:[0-9a-fA-F]{1,4}){1,6})|:((:[0-9a-fA-F]{1,4}){1,7}|:))$";

const forms = (implies: readonly string[], ...patterns: readonly string[]): Form[] => patterns.map((pattern) => ({ pattern, implies }));
const email = forms(
  [ZOD_EMAIL],
  `^[a-z0-9_]{1,20}(\\.[a-z0-9_]{1,20}){0,2}@(${LABEL}\\.){1,3}[a-z]{2,8}$`,
  "^[a-z0-9_]{1,20}@[a-z0-9]{1,20}\\.[a-z]{2,6}$",
  "^[a-z0-9]{1,8}@[a-z0-9]{1,6}\\.[a-z]{2,3}$",
);
const hostname = forms([ZOD_HOSTNAME], `^(${LABEL}\\.){1,3}[a-z]{2,8}$`, "^[a-z0-9]{1,12}\\.[a-z]{2,3}$");
const uri = forms(
  [],
  `^https?://(${LABEL}\\.){1,3}[a-z]{2,8}(/[A-Za-z0-9._~-]{0,24}){0,4}$`,
  "^https?://[a-z0-9]{1,12}\\.[a-z]{2,3}(/[a-z0-9]{1,12}){0,2}$",
);

/** The forms of each format: each is enough, later ones allow fewer and shorter texts. */
export const FORMATS: Readonly<Record<string, readonly Form[]>> = {
  date: forms([`^${ZOD_DATE}$`], `^${DATE}$`),
  time: forms([], `^${CLOCK}(\\.\\d{1,6})?${ZONE}$`, `^${CLOCK}Z$`),
  "date-time": [
    ...forms([ZOD_ZONED], `^${DATE}T${CLOCK}(\\.\\d{1,6})?${ZONE}$`),
    ...forms([ZOD_ZONED, ZOD_UTC], `^${DATE}T${CLOCK}(\\.\\d{1,6})?Z$`, `^${DATE}T${CLOCK}Z$`),
  ],
  duration: forms([ZOD_DURATION], "^P(\\d{1,4}D(T\\d{1,3}H)?|T\\d{1,3}[HMS])$"),
  email,
  "idn-email": email,
  hostname,
  "idn-hostname": hostname,
  ipv4: forms([ZOD_IPV4], `^${BYTE}(\\.${BYTE}){3}$`),
  ipv6: forms([ZOD_IPV6], "^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$"),
  uri,
  iri: uri,
  uuid: forms([ZOD_UUID], "^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"),
  "json-pointer": forms([], "^(/[A-Za-z0-9_-]{0,24}){0,8}$"),
};

/** Formats that every text has. */
export const HINTS: ReadonlySet<string> = new Set(["password", "binary", "path", "file-path", "directory-path"]);
/** Formats of the standard that have no pattern here. Any other format is a library's own name for a pattern beside it. */
export const OTHERS: ReadonlySet<string> = new Set(["uri-reference", "iri-reference", "uri-template", "relative-json-pointer", "regex"]);
