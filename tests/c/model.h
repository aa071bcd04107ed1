/* model.h - a small model of the method, to hold runs against.
 *
 * It makes the same run once more in plain vectors, without coefficients, backends or messages: who
 * evaluated which step where, what was accepted and how far off every guess was must be the same.
 */
#ifndef PARASTEP_MODEL_H
#define PARASTEP_MODEL_H

#include "stage.h"

/* Runs a stage, in double, and the model beside it, and checks that they agree.  Returns how many
 * rounds both took. */
int model_check(stage *on);

#endif
