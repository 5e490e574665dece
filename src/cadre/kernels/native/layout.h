// How a structure lies that Python fills: its fields in order, by name; what each is (pointer, integer, floating point or structure),
// its bytes and where it begins; the bytes of all. structs.py compares these words with what it has itself.
#pragma once

#include <string>
#include <type_traits>

template <class T>
static std::string field_words(const void* start, const T& field) {
    const char kind = std::is_pointer<T>::value ? 'p' : std::is_floating_point<T>::value ? 'f' : std::is_class<T>::value ? 's' : 'i';
    return std::string(" ") + kind + std::to_string(sizeof field) + "@" + std::to_string((const char*)&field - (const char*)start);
}

template <class Of, class... T>
static std::string layout_words(const char* names, const Of* start, const T&... fields) {
    return names + (std::string(":") + ... + field_words(start, fields)) + " of " + std::to_string(sizeof(Of));
}

#define LAYOUT(Of, ...)                                                                             \
    extern "C" const char* cadre_layout_##Of() {                                                    \
        struct Seen : Of {                                                                          \
            std::string words() const { return layout_words<Of>(#__VA_ARGS__, this, __VA_ARGS__); } \
        };                                                                                          \
        static const std::string words = Seen{}.words();                                            \
        return words.c_str();                                                                       \
    }
