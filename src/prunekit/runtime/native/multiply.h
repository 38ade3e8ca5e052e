/* The kernel that multiplies, written once and included for every instruction set and dtype. Defined by whoever includes it:

   NAME              of the kernel
   TARGET            attribute of the functions, so that the compiler may use the instructions
   VALUE, X          types of stored values, and of x and y
   LANES             entries of a row at a time
   SUMS              vector of partial sums; ZERO, one of zeros; ADD(a, b); TOTAL(a), a float
   ENTRIES           vector of LANES entries of a row; EXPAND(values, bits) makes it
   DOT(sums, entries, x)
   FLOAT(x), ROUND(float)   between X and float

   Entries are expanded once for up to MOST_ROWS rows of x, each with sums of its own. One row alone has a sum for every vector of a
   word: a single one would wait for itself. */

#define JOINED(a, b) a##b
#define JOIN(a, b) JOINED(a, b)
#define CHAINS (WORD / LANES)

TARGET static inline __attribute__((always_inline)) void JOIN(NAME, _rows)(
    const Product *product, int64_t begin, int64_t end, int64_t first, const int count)
{
    const Matrix *matrix = &product->matrix;
    const int64_t words = matrix->words, stride = product->stride;
    const X *x = (const X *)product->x + first * stride;
    X *y = (X *)product->y + first * matrix->rows;
    const int chains = count == 1 ? CHAINS : 1;
    for (int64_t row = begin; row < end; row++) {
        const VALUE *values = (const VALUE *)matrix->values + matrix->offsets[row];
        const unsigned char *mask = matrix->mask + 8 * row * words;
        SUMS sums[MOST_ROWS > CHAINS ? MOST_ROWS : CHAINS];
#pragma GCC unroll 16
        for (int i = 0; i < count * chains; i++)
            sums[i] = ZERO;
        for (int64_t word = 0; word < words; word++) {
            const uint64_t bits = word_at(mask, word);
#pragma GCC unroll 16
            for (int part = 0; part < CHAINS; part++) {
                const uint64_t some = bits >> (part * LANES) & (UINT64_MAX >> (WORD - LANES));
                const ENTRIES entries = EXPAND(values, some);
                values += __builtin_popcountll(some);
#pragma GCC unroll 16
                for (int i = 0; i < count; i++) {
                    const int place = chains == 1 ? i : part;
                    sums[place] = DOT(sums[place], entries, x + i * stride + word * WORD + part * LANES);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 1; i < chains; i++)
            sums[0] = ADD(sums[0], sums[i]);
        const float bias = product->bias ? FLOAT(((const X *)product->bias)[row]) : 0;
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            y[i * matrix->rows + row] = ROUND(TOTAL(sums[i]) + bias);
    }
}

TARGET static void NAME(const Product *product, int64_t begin, int64_t end)
{
    int64_t first = 0;
    for (; product->batch - first >= MOST_ROWS; first += MOST_ROWS)
        JOIN(NAME, _rows)(product, begin, end, first, MOST_ROWS);
    if (product->batch - first >= 4) {
        JOIN(NAME, _rows)(product, begin, end, first, 4);
        first += 4;
    }
    switch (product->batch - first) {
    case 3: JOIN(NAME, _rows)(product, begin, end, first, 3); break;
    case 2: JOIN(NAME, _rows)(product, begin, end, first, 2); break;
    case 1: JOIN(NAME, _rows)(product, begin, end, first, 1); break;
    }
}

#undef JOINED
#undef JOIN
#undef CHAINS
#undef NAME
#undef VALUE
#undef X
#undef LANES
#undef SUMS
#undef ZERO
#undef ADD
#undef TOTAL
#undef ENTRIES
#undef EXPAND
#undef DOT
#undef FLOAT
#undef ROUND
