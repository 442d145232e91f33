/** Wraps a component so that it renders again only when one of its props has changed. */
import { type Component, type ComponentChild, type FunctionComponent, h } from "preact";

/** React's `memo`. Preact has it only in its compatibility layer, which would change event handling on the whole page. */
export function memo<P extends object>(draw: FunctionComponent<P>): FunctionComponent<P> {
  function Kept(this: Component<P>, props: P): ComponentChild {
    this.shouldComponentUpdate = (next) => Object.keys(next).some((name) => next[name as keyof P] !== this.props[name as keyof P]);
    return h(draw, props);
  }
  return Kept as unknown as FunctionComponent<P>;
}
