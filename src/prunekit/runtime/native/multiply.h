/* The kernel that multiplies, written once and included for every instruction set and dtype. Defined by whoever includes it:

   NAME              of the kernel
   TARGET            attribute of the functions, so that the compiler may use the instructions
   VALUE, X          types of stored values, and of x and y
   LANES             entries of a row at a time
   HEIGHT            rows of the matrix at a time, where there are many rows of x
   SUMS              vector of partial sums; ZERO, one of zeros; ADD(a, b); TOTAL(a), a float
   ENTRIES           vector of LANES entries of a row; EXPAND(values, bits) makes it
   INPUTS            vector of LANES entries of x; LOAD(x) makes it
   DOT(sums, entries, inputs)
   FLOAT(x), ROUND(float)   between X and float

   Entries are expanded once for up to MOST_ROWS rows of x, each with sums of its own. One row alone has a sum for every vector of a
   word: a single one would wait for itself. MOST_ROWS take several rows of the matrix at a time, which saves loads of x; with fewer
   memory is what counts, and one after the other is faster. Values are asked for ahead of time: processors see the stream late. */

#define JOINED(a, b) a##b
#define JOIN(a, b) JOINED(a, b)
#define CHAINS (WORD / LANES)
#define AHEAD 2048 /* bytes */

TARGET static inline __attribute__((always_inline)) void JOIN(NAME, _rows)(
    const Product *product, int64_t row, int64_t first, const int height, const int count)
{
    const Matrix *matrix = &product->matrix;
    const int64_t words = matrix->words, stride = product->stride;
    const X *x = (const X *)product->x + first * stride;
    X *y = (X *)product->y + first * matrix->rows + row;
    const int chains = count == 1 ? CHAINS : 1;
    const VALUE *values[HEIGHT];
    SUMS sums[HEIGHT][MOST_ROWS > CHAINS ? MOST_ROWS : CHAINS];
#pragma GCC unroll 16
    for (int line = 0; line < height; line++) {
        values[line] = (const VALUE *)matrix->values + matrix->offsets[row + line];
#pragma GCC unroll 16
        for (int i = 0; i < count * chains; i++)
            sums[line][i] = ZERO;
    }
    const unsigned char *mask = matrix->mask + 8 * row * words;
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits[HEIGHT];
#pragma GCC unroll 16
        for (int line = 0; line < height; line++) {
            __builtin_prefetch((const char *)values[line] + AHEAD);
            __builtin_prefetch((const char *)values[line] + AHEAD + 64);
        }
#pragma GCC unroll 16
        for (int line = 0; line < height; line++)
            bits[line] = word_at(mask, line * words + word);
#pragma GCC unroll 16
        for (int part = 0; part < CHAINS; part++) {
            ENTRIES entries[HEIGHT];
#pragma GCC unroll 16
            for (int line = 0; line < height; line++) {
                const uint64_t some = bits[line] >> (part * LANES) & (UINT64_MAX >> (WORD - LANES));
                entries[line] = EXPAND(values[line], some);
                values[line] += __builtin_popcountll(some);
            }
#pragma GCC unroll 16
            for (int i = 0; i < count; i++) {
                const INPUTS inputs = LOAD(x + i * stride + word * WORD + part * LANES);
#pragma GCC unroll 16
                for (int line = 0; line < height; line++) {
                    const int place = chains == 1 ? i : part;
                    sums[line][place] = DOT(sums[line][place], entries[line], inputs);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int line = 0; line < height; line++) {
#pragma GCC unroll 16
        for (int i = 1; i < chains; i++)
            sums[line][0] = ADD(sums[line][0], sums[line][i]);
        const float bias = product->bias ? FLOAT(((const X *)product->bias)[row + line]) : 0;
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            y[i * matrix->rows + line] = ROUND(TOTAL(sums[line][i]) + bias);
    }
}

#define ROWS(COUNT)                                                \
    {                                                              \
        const int height = (COUNT) < MOST_ROWS ? 1 : HEIGHT;       \
        int64_t row = begin;                                       \
        for (; row + height <= end; row += height)                 \
            JOIN(NAME, _rows)(product, row, first, height, COUNT); \
        for (; row < end; row++)                                   \
            JOIN(NAME, _rows)(product, row, first, 1, COUNT);      \
    }

TARGET static void NAME(const Product *product, int64_t begin, int64_t end)
{
    int64_t first = 0;
    for (; product->batch - first >= MOST_ROWS; first += MOST_ROWS)
        ROWS(MOST_ROWS)
    if (product->batch - first >= 4) {
        ROWS(4)
        first += 4;
    }
    switch (product->batch - first) {
    case 3: ROWS(3) break;
    case 2: ROWS(2) break;
    case 1: ROWS(1) break;
    }
}

#undef ROWS
#undef JOINED
#undef JOIN
#undef CHAINS
#undef AHEAD
#undef NAME
#undef VALUE
#undef X
#undef LANES
#undef HEIGHT
#undef SUMS
#undef ZERO
#undef ADD
#undef TOTAL
#undef ENTRIES
#undef EXPAND
#undef INPUTS
#undef LOAD
#undef DOT
#undef FLOAT
#undef ROUND
