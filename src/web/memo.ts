/** A component that is drawn again only when something that it is given has changed. */
import { type Component, type ComponentChild, type FunctionComponent, h } from "preact";

/** As React's: Preact has it in its compatibility layer only, which changes how events work on the whole page. */
export function memo<P extends object>(draw: FunctionComponent<P>): FunctionComponent<P> {
  function Kept(this: Component<P>, props: P): ComponentChild {
    this.shouldComponentUpdate = (next) => Object.keys(next).some((name) => next[name as keyof P] !== this.props[name as keyof P]);
    return h(draw, props);
  }
  return Kept as unknown as FunctionComponent<P>;
}
