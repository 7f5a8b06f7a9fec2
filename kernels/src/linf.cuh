// The arithmetic of a signed step inside an linf ball, on float32 pixels in [0, 1] and on 8-bit levels.
#pragma once
#include "common.cuh"

// Of a NaN, 0: a NaN step would poison the pixel for good.
HOST_DEVICE int sign_of(float x) { return int(x > 0.0f) - int(x < 0.0f); }

// Clamping that lets a NaN on either side through, as torch.clamp does with tensor bounds.
HOST_DEVICE float at_least(float value, float low) { return value >= low || value != value ? value : low; }
HOST_DEVICE float at_most(float value, float high) { return value <= high || value != value ? value : high; }

HOST_DEVICE int at_least(int value, int low) { return value > low ? value : low; }
HOST_DEVICE int at_most(int value, int high) { return value < high ? value : high; }

// x - eps <= x_adv <= x + eps and the image range.
HOST_DEVICE float clip_to_ball(float x_adv, float x, float eps) {
    float low = at_least(x - eps, 0.0f), high = at_most(x + eps, 1.0f);
    return at_most(at_least(x_adv, low), high);
}

// What a pixel is kept in decides what eps and alpha count: fractions of the range, or levels.
template <class State>
struct Pixel;

template <>
struct Pixel<float> {
    using Distance = float;

    HOST_DEVICE static float step(float x_adv, float grad, float x, float eps, float alpha) {
        return clip_to_ball(x_adv + alpha * float(sign_of(grad)), x, eps);
    }

    HOST_DEVICE static float value(float x) { return x; }
};

template <>
struct Pixel<Byte> {
    using Distance = int;

    HOST_DEVICE static Byte step(Byte x_adv, float grad, Byte x, int eps, int alpha) {
        int low = at_least(int(x) - eps, 0), high = at_most(int(x) + eps, 255);
        return Byte(at_most(at_least(int(x_adv) + alpha * sign_of(grad), low), high));
    }

    // Division, not multiplication by 1/255: every k/255 is then correctly rounded.
    HOST_DEVICE static float value(Byte x) { return float(x) / 255.0f; }
};
