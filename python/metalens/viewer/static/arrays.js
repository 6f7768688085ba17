// Arrays of a document: little-endian numbers in base64, or plain lists.

/**
 * An array as the document holds it.
 * @typedef {{dtype: string, shape: number[], base64: string}} Packed
 */

/**
 * Return the bytes that a base64 text spells.
 * @param {string} text
 * @returns {Uint8Array<ArrayBuffer>}
 */
function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/**
 * Return half-precision numbers as float32. Few browsers have a Float16Array.
 * @param {Uint16Array} halves
 * @returns {Float32Array}
 */
function fromHalf(halves) {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const h = halves[i];
    const exponent = (h >> 10) & 31;
    const fraction = h & 1023;
    const size = exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
    out[i] = h & 0x8000 ? -size : size;
  }
  return out;
}

/**
 * Return the numbers of an array, in C order.
 * @param {Packed} packed
 * @returns {Float32Array | Int32Array | Uint32Array}
 */
export function unpack(packed) {
  const { buffer } = bytesOf(packed.base64);
  switch (packed.dtype) {
    case "float32":
      return new Float32Array(buffer);
    case "float16":
      return fromHalf(new Uint16Array(buffer));
    case "int32":
      return new Int32Array(buffer);
    case "uint32":
      return new Uint32Array(buffer);
    default:
      throw new Error(`The document has an array of the type ${packed.dtype}, which this page does not know. Write it again with this version of metalens.`);
  }
}

/**
 * A table that grows by columns: one block of `width` numbers for each position.
 *
 * Documents have rows (layers) first. Here positions come first, so that a new token is appended and nothing moves.
 */
export class Columns {
  /**
   * @param {number} rows layers, and the model's own row after them
   * @param {number} [each] numbers in a cell
   */
  constructor(rows, each = 1) {
    this.rows = rows;
    this.each = each;
    this.length = 0;
    this.values = new Float32Array(rows * each * 64);
  }

  /**
   * Append columns.
   * @param {ArrayLike<number>} layers [rows - 1, positions, each]
   * @param {ArrayLike<number> | null} model [positions, each]; null = no value
   * @param {number} positions
   */
  append(layers, model, positions) {
    const { rows, each } = this;
    const width = rows * each;
    const needed = (this.length + positions) * width;
    if (needed > this.values.length) {
      const larger = new Float32Array(Math.max(needed, 2 * this.values.length));
      larger.set(this.values.subarray(0, this.length * width));
      this.values = larger;
    }
    for (let t = 0; t < positions; t++) {
      let to = (this.length + t) * width;
      for (let r = 0; r < rows - 1; r++) {
        const from = (r * positions + t) * each;
        for (let i = 0; i < each; i++) this.values[to++] = layers[from + i];
      }
      for (let i = 0; i < each; i++) this.values[to++] = model ? model[t * each + i] : NaN;
    }
    this.length += positions;
  }

  /**
   * Return one number; NaN at a position that has not arrived.
   * @param {number} row
   * @param {number} position
   * @param {number} [i] which number of the cell
   */
  at(row, position, i = 0) {
    return position < this.length ? this.values[(position * this.rows + row) * this.each + i] : NaN;
  }
}
