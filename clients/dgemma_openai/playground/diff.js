// What changed in a canvas from step to step. A preview is text without positions, so it is aligned with the one before.
// Knows no page.

export const SETTLED = 2; // steps without a change

/** Words, and all other characters one by one. */
export function pieces(text) {
  return text.match(/\p{L}+|\P{L}/gu) ?? [];
}

/** For each of `after`, the index in `before` of what it was, or -1: a longest common subsequence. */
export function align(before, after) {
  const found = new Array(after.length).fill(-1);
  let start = 0;
  let oldEnd = before.length;
  let newEnd = after.length;
  while (start < oldEnd && start < newEnd && before[start] === after[start]) found[start] = start++;
  while (oldEnd > start && newEnd > start && before[oldEnd - 1] === after[newEnd - 1]) found[--newEnd] = --oldEnd;
  const width = newEnd - start + 1;
  const best = new Uint32Array((oldEnd - start + 1) * width); // lengths from (row, column) to the ends
  for (let row = oldEnd - start - 1; row >= 0; row--) {
    for (let column = width - 2; column >= 0; column--) {
      const here = row * width + column;
      const same = before[start + row] === after[start + column];
      best[here] = same ? best[here + width + 1] + 1 : Math.max(best[here + width], best[here + 1]);
    }
  }
  for (let row = start, column = start; row < oldEnd && column < newEnd; ) {
    if (before[row] === after[column]) found[column++] = row++;
    else if (best[(row - start + 1) * width + column - start] >= best[(row - start) * width + column - start + 1]) row++;
    else column++;
  }
  return found;
}

/** The canvas after one more step. `age` of a piece counts the steps since it last changed, up to SETTLED. */
export function step(before, text) {
  const after = pieces(text);
  const ages = align(before?.pieces ?? [], after).map((old) => (old < 0 ? 0 : Math.min(before.ages[old] + 1, SETTLED)));
  return { pieces: after, ages };
}

/** Neighbouring pieces of one age, as {text, age}. */
export function spans({ pieces, ages }) {
  const joined = [];
  pieces.forEach((text, index) => {
    if (joined.at(-1)?.age === ages[index]) joined.at(-1).text += text;
    else joined.push({ text, age: ages[index] });
  });
  return joined;
}
