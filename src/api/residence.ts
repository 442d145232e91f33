/** The values of the option `weights`: where weights are kept. Loads nothing. */
export { RESIDENCES, type Residence } from "../backend/backend.ts";
